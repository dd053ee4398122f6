"""The page report.html of a run and of a scored output, and its pictures.

`manifest` is the content of manifest.json, `description` that of model.json, `history` are the
lines of history.jsonl, and `pictures` are PNG files by their names.
"""

import io
import platform
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import jinja2
from markupsafe import Markup
from PIL import Image

from mnistsum_ray import __version__
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.errors import counted, one_line, percent, spelled
from mnistsum_ray.model.heads import HEADS, Head
from mnistsum_ray.reporting.console import accuracies
from mnistsum_ray.storage.store import Location

REPORT: Final = "report.html"

PICTURES: Final = {
    "history.png": "Loss and error by epoch",
    "confusion.png": "Digits: confusion matrix",
    "mistakes.png": "The most confident mistakes",
    "reliability.png": "Reliability: accuracy by predicted probability, with numbers of answers",
}
"""Titles of the pictures by their file names."""

Table = tuple[str, tuple[Any, ...], list[tuple[Any, ...]]]
"""Title, names of the columns, and rows. One without rows is not shown."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what counts."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    return {"python": platform.python_version(), "mnistsum_ray": __version__} | packages


def report_page(
    manifest: dict[str, Any], description: dict[str, Any], pictures: dict[str, bytes]
) -> str:
    """Render the HTML page of a finished training: accuracies, pictures, configuration."""
    data, test = manifest["data"], description["test"]
    cards = [(percent(test[f"{head.name}_accuracy"]), f"{head.name} correct") for head in HEADS]
    speed, seconds = manifest["metrics"]["images_per_second"], manifest["training_seconds"]
    cards.append((f"{speed:,.0f}", "training images per second"))
    cards.append((f"{seconds:,.0f} s", "for the epochs, evaluation included"))
    on_sample = " (on the sample)" if data["notice"] else ""
    tested = f"Epoch {description['epoch']}, on {test['rows']:,} test images with every number."
    run = shlex.quote(manifest["metrics"]["run"])
    command = f"mnistsum score --model {run} --input PAIRS --output SCORED"
    weights = {key: description[key] for key in ("parameters", "sha256")}
    tables = [
        _accuracy_table(manifest["error_analysis"]["confusion"]),
        _reasons_table("Rows left out", data["bad_rows"]),
        _settings_table(manifest, weights),
    ]
    return _render(
        pictures,
        title=f"{manifest['config']['name']}: {accuracies(test)}{on_sample}",
        lines=[data["notice"], tested],
        cards=cards,
        tables=tables,
        command=command,
    )


def scored_page(manifest: dict[str, Any], mistake_images: Sequence[Pixels]) -> str:
    """Render the HTML page of a scored output, with the images of the manifest's mistakes."""
    totals, counts = manifest["totals"], manifest["counts"]
    all_rows = totals["input_rows"] + totals.get("left_rows", 0)
    cards = [
        (f"{totals['rejected_rows']:,}", "rows rejected"),
        (f"{totals['failed_files']:,}", f"files not usable, with {totals['failed_rows']:,} rows"),
    ]
    if counts.get("labelled_rows"):
        for head in HEADS:
            correct = f"{head.name} correct, of {counts['labelled_rows']:,} labelled rows"
            cards.append((percent(totals[f"{head.name}_accuracy"]), correct))
    cards.append((f"{totals['rows_per_second']:,.0f}", "rows per second"))
    failures = list(manifest["failures"].items())
    if len(failures) < totals["failed_files"]:
        failures.append((f"all {totals['failed_files']:,}", "are in files.parquet"))
    digits = enumerate(counts.get("predicted_digits", []))
    mistakes = []
    for mistake, image in zip(manifest["mistakes"], mistake_images, strict=True):
        answers = [_answer(mistake, head) for head in HEADS]
        mistakes.append((_image_cell(image), *answers, mistake["file"], f"{mistake['row']:,}"))
    tenths = []
    if "predicted_digits" in counts:  # not where nothing is scored
        for tenth in range(10):
            of_heads = [f"{counts[f'{head.name}_probabilities'][tenth]:,}" for head in HEADS]
            tenths.append((f"{tenth / 10} to {(tenth + 1) / 10}", *of_heads))
    tables = [
        ("Files that cannot be used", ("file", "reason"), failures),
        _reasons_table("Rejected rows", manifest["bad_rows"]),
        ("Predicted digits", ("digit", "rows"), [(digit, f"{rows:,}") for digit, rows in digits]),
        ("Probabilities", ("probability", *(f"{head.name}, rows" for head in HEADS)), tenths),
        (PICTURES["mistakes.png"], ("", *(head.name for head in HEADS), "file", "row"), mistakes),
        _confusion_table(counts.get("confusion", [])),
        _settings_table(manifest, manifest["model"]),
    ]
    return _render(
        {},
        title=f"{totals['scored_rows']:,} of {all_rows:,} rows scored",
        lines=[f"{totals['output']}, from {counted(totals['files'], 'file')}", manifest["notice"]],
        cards=cards,
        tables=tables,
    )


def _answer(mistake: dict[str, Any], head: Head) -> str:
    """What a head has answered, how sure it was, and what is true."""
    predicted = mistake[f"pred_{head.name}"]
    true = head.target(mistake["digit"], mistake["number"])
    wrong = "" if predicted == true else f", not {true}"
    return f"{predicted} ({percent(mistake[f'{head.name}_prob'])}){wrong}"


def _image_cell(image: Pixels) -> Markup:
    """An image in a cell. Drawing by matplotlib would cost each scoring a second."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    source = f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
    return Markup('<img alt="" width="56" src="{}">').format(source)


def _accuracy_table(confusion: list[list[int]]) -> Table:
    """Rows and share correct by true digit, which the picture of the confusion matrix has not."""
    rows = []
    for digit, *predicted, correct in _confusion_table(confusion)[2]:
        rows.append((digit, f"{sum(predicted):,}", correct))
    return "Accuracy by digit", ("digit", "rows", "correct"), rows


def _confusion_table(confusion: list[list[int]]) -> Table:
    """Rows by true digit (down) and predicted digit (across), and how many of them are correct."""
    rows = []
    for digit, predicted in enumerate(confusion):
        correct = percent(predicted[digit] / sum(predicted)) if any(predicted) else ""
        rows.append((digit, *predicted, correct))
    columns = ("", *range(len(confusion)), "correct")
    return "Digits: true (down) and predicted (across)", columns, rows


def _reasons_table(title: str, counts: dict[str, Any]) -> Table:
    """Bad rows by reason, and which are the first five; `counts`: of `ReasonCounts`."""
    rows = []
    for reason, count in Counter(counts["reasons"]).most_common():
        examples = [(file, row) for file, row, why in counts["examples"] if why == reason]
        places = "; ".join(f"{file}, row {row:,}" for file, row in examples)
        rows.append((f"{count:,}", reason, places))
    return title, ("rows", "reason", "for example"), rows


def _settings_table(manifest: dict[str, Any], model: dict[str, Any]) -> Table:
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


def _render(pictures: dict[str, bytes], **values: Any) -> str:
    loader = jinja2.PackageLoader("mnistsum_ray.reporting", ".")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    shown = [(PICTURES[name], b64encode(png).decode()) for name, png in pictures.items()]
    return template.render(pictures=shown, **values)


def write_report(
    folder: Location,
    manifest: dict[str, Any],
    description: dict[str, Any],
    history: list[dict[str, Any]],
    mistake_images: Pixels,
    say: Callable[[str], None],
) -> None:
    """Write the pictures and report.html of a run; what cannot be drawn never costs the run."""
    analysis = manifest["error_analysis"]
    rate = manifest["config"]["learning_rate"]
    pictures = {}
    try:
        from mnistsum_ray.reporting import plots  # takes a second, and may be what fails

        draw = plots.draw_png
        pictures["history.png"] = draw(plots.draw_history, history, rate)
        pictures["confusion.png"] = draw(plots.draw_confusion, analysis["confusion"])
        pictures["mistakes.png"] = draw(plots.draw_mistakes, analysis["mistakes"], mistake_images)
        pictures["reliability.png"] = draw(plots.draw_reliability, analysis["probabilities"])
    except Exception as error:  # such as of a font that a user's settings name
        say(f"a picture cannot be drawn: {one_line(error)}; {REPORT} is without it")
    for name, picture in pictures.items():
        (folder / name).write(picture)
    (folder / REPORT).write(report_page(manifest, description, pictures).encode())
