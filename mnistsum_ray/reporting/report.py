"""What is left of a run to read: history.jsonl, and report.html, one page with everything in it."""

import base64
import json
from collections.abc import Iterable
from typing import Any, Final

import jinja2

from mnistsum_ray.storage.location import Location

REPORT: Final = "report.html"

PICTURES: Final = {
    "history.png": "Loss and accuracy by epoch",
    "confusion.png": "Digits: true and predicted",
    "sums.png": "Sums: accuracy by digit and number",
    "reliability.png": "How often an answer is right, by its probability",
    "mistakes.png": "The most confident mistakes",
}
"""File name in the run folder, and what it shows."""


def write_history(run: Location, history: Iterable[dict[str, Any]]) -> None:
    """`history.jsonl`: one line an epoch."""
    (run / "history.jsonl").write_bytes("".join(json.dumps(entry) + "\n" for entry in history).encode())


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The metrics of one line of history.jsonl by the names that TensorBoard and MLflow show."""
    named = {
        "train/loss": entry["train_loss"],
        "train/learning_rate": entry["learning_rate"],
        "train/rows_per_second": entry["rows_per_second"],
        "train/waiting": entry["waiting"],
    }
    return named | _scores(entry, "")


def model_scalars(card: dict[str, Any]) -> dict[str, float]:
    """What model.json says that the model scored, by the names that TensorBoard and MLflow show."""
    return _scores(card, "model/")


def _scores(said: dict[str, Any], before: str) -> dict[str, float]:
    names = ("loss", "digit_accuracy", "sum_accuracy")
    return {f"{before}{rows}/{name}": said[rows][name] for rows in ("validation", "test") for name in names}


def report_page(
    name: str, manifest: dict[str, Any], card: dict[str, Any], history: list[dict[str, Any]], pictures: dict[str, bytes]
) -> str:
    """The page of a finished run: what was run, on what, how well, the pictures, and how to score with it.

    Args:
        name: of the run.
        manifest: manifest.json.
        card: model.json.
        history: the lines of history.jsonl.
        pictures: PNG by the names of PICTURES.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnistsum_ray.reporting", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    shown = [(PICTURES[key], base64.b64encode(png).decode()) for key, png in pictures.items()]
    page: str = environment.get_template("report.html.j2").render(
        name=name, manifest=manifest, card=card, history=history, pictures=shown
    )
    return page
