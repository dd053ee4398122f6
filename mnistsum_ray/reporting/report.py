"""The page report.html of a run, its pictures, and what the page of a scored output has too.

`manifest` is the content of manifest.json, `description` that of model.json, `history` are the
lines of history.jsonl, and `pictures` are titles and PNG files by the names of the files.
"""

import platform
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import jinja2

from mnistsum_ray import __version__
from mnistsum_ray.errors import one_line, spelled
from mnistsum_ray.reporting.console import describe_metrics, metric_value, short_name
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import BUILT_IN, Findings, Table

REPORT: Final = "report.html"

Pictures: TypeAlias = dict[str, tuple[str, bytes]]


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what counts."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__} | packages


def how_to_score(command: str, task: str, model: str) -> str:
    """Return the command that scores with a model; `task` is the text that names its task."""
    of_task = "" if task == BUILT_IN else f" --task {shlex.quote(task)}"
    return f"{command}{of_task} --model {shlex.quote(model)} --input ROWS --output SCORED"


def report_page(
    manifest: dict[str, Any],
    description: dict[str, Any],
    findings: Findings,
    pictures: Pictures,
) -> str:
    """Render the HTML page of a finished training: metrics, pictures, configuration."""
    data, test, metrics = manifest["data"], description["test"], manifest["metrics"]
    cards = [
        *metric_cards(test),
        (f"{metrics['rows_per_second']:,.0f}", "training rows per second"),
        (f"{manifest['training_seconds']:,.0f} s", "for the epochs, evaluation included"),
    ]
    on_sample = " (on the sample)" if data["notice"] else ""
    tested = f"Epoch {description['epoch']}, on the test split of {test['rows']:,} rows."
    weights = {key: description[key] for key in ("parameters", "sha256")}
    return render(
        pictures,
        title=f"{manifest['config']['name']}: {describe_metrics(test, counts=False)}{on_sample}",
        lines=[data["notice"], findings.notice, tested],
        cards=cards,
        tables=[
            *findings.tables,
            reasons_table("Rejected rows", data["bad_rows"]),
            settings_table(manifest, weights),
        ],
        command=how_to_score("mnistsum score", manifest["config"]["task"], metrics["run"]),
    )


def metric_cards(metrics: dict[str, Any], of_rows: str = "") -> list[tuple[str, str]]:
    """Return a card for each metric: its value and its meaning."""
    cards = []
    for name, value in metrics.items():
        if value is None or isinstance(value, int) or name == "loss":
            continue
        of_metric = " correct" if name.endswith("_accuracy") else ""
        cards.append((metric_value(name, value), short_name(name) + of_metric + of_rows))
    return cards


def reasons_table(title: str, counts: dict[str, Any]) -> Table:
    """Rejected rows by reason, and which are the first five; `counts`: of `ReasonCounts`."""
    rows = []
    for reason, count in Counter(counts["reasons"]).most_common():
        examples = [(file, row) for file, row, why in counts["examples"] if why == reason]
        places = "; ".join(f"{file}, row {row:,}" for file, row in examples)
        rows.append((f"{count:,}", reason, places))
    return title, ("rows", "reason", "for example"), rows


def settings_table(manifest: dict[str, Any], model: dict[str, Any]) -> Table:
    """Settings and what the run has chosen, without what is unset or has a table of its own."""
    keys = ("started", "finished", "workers", "precision", "data", "hardware", "versions")
    # The manifest knows what the config has left open, as its precision.
    settings = manifest["config"] | {key: manifest[key] for key in keys if key in manifest}
    rows = []
    for key, value in (settings | {"weights": model}).items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if isinstance(value, dict):
            shown = [name for name in value if value[name] not in (None, "") and name != "bad_rows"]
            value = ", ".join(f"{name} {value[name]}" for name in shown)
        if value is not None:
            rows.append((key.replace("_", "-"), spelled(value)))
    return "Configuration", (), rows


def render(pictures: Pictures, **values: Any) -> str:
    """Return the page with its pictures, title, lines, cards, tables and maybe a command."""
    loader = jinja2.PackageLoader("mnistsum_ray.reporting", ".")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    shown = [(title, b64encode(png).decode()) for title, png in pictures.values()]
    return template.render(pictures=shown, **values)


def write_report(
    folder: Location,
    manifest: dict[str, Any],
    description: dict[str, Any],
    history: Sequence[dict[str, Any]],
    findings: Findings,
    say: Callable[[str], None],
) -> None:
    """Write the pictures and report.html of a run; what cannot be drawn never costs the run."""
    rate = manifest["config"]["learning_rate"]
    pictures: Pictures = {}
    try:
        from mnistsum_ray.reporting import plots  # takes a second, and may be what fails

        png = plots.draw_png(plots.draw_history, history, rate)
        pictures["history.png"] = ("Loss and metrics by epoch", png)
        for name, (title, draw) in findings.pictures.items():
            pictures[name] = (title, plots.draw_png(draw))
    except Exception as error:  # such as of a font that a user's settings name
        say(f"a picture cannot be drawn: {one_line(error)}; {REPORT} omits it")
    for name, (_, png) in pictures.items():
        (folder / name).write(png)
    (folder / REPORT).write(report_page(manifest, description, findings, pictures).encode())
