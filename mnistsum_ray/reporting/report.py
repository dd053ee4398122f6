"""Readable records of a training run: history.jsonl, and report.html, one page with everything in it."""

import base64
import json
import math
from collections.abc import Iterable
from typing import Any, Final

import jinja2

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.storage.location import Location

REPORT: Final = "report.html"

PICTURES: Final = {
    "history.png": "Loss and accuracy by epoch",
    "confusion.png": "Digits: confusion matrix",
    "sums.png": "Sums: accuracy by digit and number",
    "reliability.png": "Reliability: accuracy by predicted probability",
    "mistakes.png": "The most confident mistakes",
}
"""Titles of the pictures by their file names in the run folder."""


def write_history(run: Location, history: Iterable[dict[str, Any]]) -> None:
    """Write `history.jsonl`, one line per epoch."""
    (run / "history.jsonl").write_bytes("".join(json.dumps(entry) + "\n" for entry in history).encode())


def epoch_scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Metrics of one line of history.jsonl, under the names that TensorBoard and MLflow show."""
    named = {
        "train/loss": entry["train_loss"],
        "train/learning_rate": entry["learning_rate"],
        "train/rows_per_second": entry["rows_per_second"],
        "train/waiting": entry["waiting"],
    }
    return named | _scores(entry, "")


def model_scalars(card: dict[str, Any]) -> dict[str, float]:
    """Metrics of the published model (`card`: model.json), under the names that TensorBoard and MLflow show."""
    return _scores(card, "model/")


def _scores(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    names = ("loss", *(f"{head.name}_accuracy" for head in HEADS))
    return {f"{prefix}{split}/{name}": metrics[split][name] for split in ("validation", "test") for name in names}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent rows (Wilson 1927), 0..1."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def report_page(
    name: str, manifest: dict[str, Any], card: dict[str, Any], history: list[dict[str, Any]], pictures: dict[str, bytes]
) -> str:
    """Render the HTML page of a finished run: results, pictures, epochs, how to score with the model, configuration.

    Args:
        name: name of the run.
        manifest: contents of manifest.json.
        card: contents of model.json.
        history: lines of history.jsonl.
        pictures: PNG bytes by file name (keys of PICTURES).
    """
    return _render(
        "report.html.j2",
        {PICTURES[key]: png for key, png in pictures.items()},
        name=name,
        manifest=manifest,
        card=card,
        history=history,
        intervals={head.name: wilson_interval(card["test"][f"{head.name}_accuracy"], card["test"]["rows"]) for head in HEADS},
    )


def scored_page(manifest: dict[str, Any], totals: Any, pictures: dict[str, bytes]) -> str:
    """Render the HTML page of a scored output: counts, rejected rows with examples, frequencies, the least sure rows, pictures.

    Args:
        manifest: contents of manifest.json.
        totals: `scoring.totals.Totals`.
        pictures: PNG bytes by title.
    """
    return _render("scored.html.j2", pictures, manifest=manifest, line=manifest["totals"], totals=totals)


def _render(template: str, pictures: dict[str, bytes], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnistsum_ray.reporting", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    shown = [(title, base64.b64encode(png).decode()) for title, png in pictures.items()]
    page: str = environment.get_template(template).render(
        pictures=shown, heads=[head.name for head in HEADS], numbers=range(NUMBERS), **values
    )
    return page
