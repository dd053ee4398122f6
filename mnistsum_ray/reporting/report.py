"""Readable records of a run: report.html, the model card, the versions of the software; and the names of metrics.

Here, in tensorboard.py and in mlflow.py `manifest` is the content of manifest.json, `card` that of model.json, `history` are the
lines of history.jsonl, and `pictures` are PNG files by their names where no other key is named.
"""

import base64
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import jinja2

from mnistsum_ray import __version__
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import printable
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.console import accuracies

REPORT: Final = "report.html"

MODEL_CARD: Final = "README.md"
"""Model card in the model folder, in the form that the Hugging Face Hub reads."""

PICTURES: Final = {
    "history.png": "Loss and error by epoch",
    "confusion.png": "Digits: confusion matrix",
    "sums.png": "Sums: mistakes by digit and number",
    "reliability.png": "Reliability: accuracy by predicted probability",
    "mistakes.png": "The most confident mistakes",
}
"""Titles of the pictures by their file names in a run folder."""

_PIXELS: Final = 1.5
"""Pixels of a picture for each pixel of the page: text has one size in all pictures."""

_MNIST: Final = (
    "274a52c43a2b8adc53cdd8b35dc4f36492c594e8fc0e3c9351f8ad9944bee783",
    "986e3361d5898d3ff6ecb3eb083623e8d05ca602b9ea76d29c095638c1126373",
)
"""`Source.content_sha256` of full MNIST and of the sample; other data may have its format too."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package (with its commit, in a checkout) and of the packages that its results depend on."""
    packages = {name: version(name) for name in ("ray", "torch", "pyarrow", "numpy")}
    commit = _commit()
    ours = {"mnistsum_ray": __version__} | ({"commit": commit} if commit else {})
    return {"python": platform.python_version(), **ours, **packages}


def _commit() -> str | None:
    """Commit of the source that this process runs, with `+` if files of the checkout have changed; None outside of one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # an installed package may be in a checkout of another project
        return None
    describe = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:  # a git may be missing, or, as on a network file system, not answer
        return subprocess.check_output(describe, text=True, stderr=subprocess.DEVNULL, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def epoch_end(entry: dict[str, Any]) -> float:
    """When the evaluation of a line of history.jsonl had ended, in seconds since 1970."""
    return float(entry["started"] + entry["seconds"] + entry["evaluation_seconds"])


def epoch_seconds(entry: dict[str, Any]) -> float:
    """Time of a line of history.jsonl, evaluation included, in all commands together but for work that a kill has cost."""
    return float(entry["seconds"] + entry.get("seconds_before", 0.0) + entry["evaluation_seconds"])


def epoch_scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Metrics of one line of history.jsonl, under the names that TensorBoard and MLflow show.

    `epoch/` tells them from those of the published model: its sum head has been fine-tuned since, and its scores calibrated.
    """
    names = ("learning_rate", "rows_per_second", "waiting")
    train = {"loss": entry["train_loss"]} | {name: entry[name] for name in names}
    return {f"epoch/train/{name}": value for name, value in train.items()} | _scores(entry, "epoch")


def model_scalars(card: dict[str, Any]) -> dict[str, float]:
    """Metrics of the published model, under the names that TensorBoard and MLflow show."""
    return _scores(card, "final")


def _scores(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    names = ("loss", *(f"{head.name}_accuracy" for head in HEADS))
    return {f"{prefix}/{split}/{name}": metrics[split][name] for split in ("validation", "test") for name in names}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent rows (Wilson 1927), 0..1."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def report_page(
    name: str, manifest: dict[str, Any], card: dict[str, Any], history: list[dict[str, Any]], pictures: dict[str, bytes]
) -> str:
    """Render the HTML page of a finished run: results, pictures, epochs, how to score with the model, configuration."""
    intervals = {head.name: wilson_interval(card["test"][f"{head.name}_accuracy"], card["test"]["rows"]) for head in HEADS}
    shown = _encoded({PICTURES[key]: picture for key, picture in pictures.items()})
    return _render(
        "report.html.j2", pictures=shown, name=name, manifest=manifest, card=card, history=history, intervals=intervals
    )


def scored_page(manifest: dict[str, Any], totals: Any, pictures: dict[str, bytes]) -> str:
    """Render the HTML page of a scored output: counts, rejected rows with examples, frequencies, the least sure rows, pictures.

    `totals` are `scoring.counts.RowCounts`; `pictures` are by title.
    """
    return _render("scored.html.j2", pictures=_encoded(pictures), manifest=manifest, line=manifest["totals"], totals=totals)


def model_card(name: str, card: dict[str, Any], data: dict[str, Any]) -> str:
    """Render the model card; `name` is the run's, and `data` an entry of its manifest."""
    return _render("model_card.md.j2", name=name, card=card, data=data, of_mnist=data["sha256"] in _MNIST)


def _encoded(pictures: dict[str, bytes]) -> list[tuple[str, int, str]]:
    """Title, width on the page, and base64 of the PNG file, whose bytes 16 to 19 are its width."""
    return [
        (title, round(int.from_bytes(png[16:20], "big") / _PIXELS), base64.b64encode(png).decode())
        for title, png in pictures.items()
    ]


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnistsum_ray.reporting", "."),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        # As on the console: a file name may hold control characters. Markup is what a filter has made for the page.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    values |= {"heads": [head.name for head in HEADS], "numbers": range(NUMBERS), "accuracies": accuracies}
    return str(environment.get_template(template).render(values))
