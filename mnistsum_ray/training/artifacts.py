"""What is left of a training run in its folder: manifest, model, history, pictures, report."""

import json
from pathlib import Path
from typing import Any, Final

import ray.train

from mnistsum_ray.model.serialization import MODEL_FILES
from mnistsum_ray.reporting.report import REPORT, report_page, write_history
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.trainer import TrainingResult


def build_manifest(run: TrainingRun, fingerprint: str, workers: str) -> dict[str, Any]:
    """What manifest.json says when a run begins: hyperparameters, versions, `workers` in words, and the data with their SHA-256."""
    source = run.source
    return {
        "status": "running",
        "config": run.config.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions(),
        "workers": workers,
        "data": {
            "source": source.name,
            "location": source.location,
            "notice": source.notice,
            "sha256": fingerprint,
            "train_rows": len(source.train),
            "validation_rows": len(source.validation),
            "test_rows": len(source.test),
        },
    }


FINAL_FIELDS: Final = ("temperature", "probabilities", "int8")
"""Fields of model.json that are not known before training has ended."""


def publish_model(
    folder: Location, checkpoint: ray.train.Checkpoint, history: list[dict[str, Any]], found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Put the best model so far, which every checkpoint carries, and the history into the run folder; the model's card.

    `found` is what the end of training adds to the card: temperatures, probability metrics, calibration for int8. What is there
    already of the same weights stays, so that a scoring run that began with it can go on.
    """
    from mnistsum_ray.reporting import tensorboard  # not needed before there is an epoch

    weights, card = MODEL_FILES
    with checkpoint.as_directory() as local:
        new: dict[str, Any] = json.loads((Path(local) / card).read_text())
        place = folder / "model" / card
        old = place.read_json() if place.exists() else {}
        same = old.get("sha256") == new["sha256"] and "probabilities" in old
        known = {key: old[key] for key in FINAL_FIELDS if same and key in old}
        (folder / "model" / weights).write_bytes((Path(local) / weights).read_bytes())
        new |= (found or {}) | known
        place.write_json(new)
    write_history(folder, history)
    tensorboard.write_epochs(folder, history)
    return new


def write_report(run: TrainingRun, manifest: dict[str, Any], card: dict[str, Any], outcome: TrainingResult) -> list[str]:
    """Pictures, report and TensorBoard's last file; the names of what a person may want to have elsewhere."""
    from mnistsum_ray.reporting import pictures, tensorboard  # a second to import, needed once

    found = outcome.examination
    drawn = {
        "history.png": pictures.draw_history(outcome.history),
        "confusion.png": pictures.draw_confusion(found.confusion),
        "sums.png": pictures.draw_sums(found.sums_right, found.confusion),
        "reliability.png": pictures.draw_reliability(found.reliability()),
        "mistakes.png": pictures.draw_mistakes(found.as_json()["mistakes"], outcome.mistaken),
    }
    for name, png in drawn.items():
        (run.folder / name).write_bytes(png)
    page = report_page(str(run.config.name), manifest, card, outcome.history, drawn)
    (run.folder / REPORT).write_bytes(page.encode())
    tensorboard.write_end(run.folder, outcome.history[-1]["epoch"], card, drawn, manifest["config"])
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in MODEL_FILES)]
