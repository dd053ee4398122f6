"""Files of a run folder for people and other programs: manifest, model, history, pictures, report."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import torch

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.parquet_files import ParquetFiles
from mnistsum_ray.model.serialization import DESCRIPTION_FILE, WEIGHTS_FILE, read_description, save_model
from mnistsum_ray.reporting.report import REPORT, report_page
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.resources import ResourcePlan

DATA_FILES: Final = "data_files.parquet"
"""`parquet_files.FILE_SCHEMA` of the files that a run streams."""

FINAL_FIELDS: Final = ("temperature", "probabilities", "int8")
"""Fields of model.json that are known only after training."""


def build_manifest(run: TrainingRun, fingerprint: str, plan: ResourcePlan) -> dict[str, Any]:
    """The manifest of a starting run: config, versions, workers, and the data with their SHA-256."""
    source = run.source
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json", exclude={"config", "resume"}),
        "versions": versions(),
        "workers": plan.describe(),
        "num_workers": plan.workers,
        "use_gpu": plan.use_gpu,
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


def write_data_files(folder: Location, files: ParquetFiles) -> None:
    """Write down the files that a run streams, so that a resumed run can name one that has changed."""
    (folder / DATA_FILES).write_bytes(to_parquet(files.table))


def write_history(folder: Location, history: list[dict[str, Any]]) -> None:
    """Write history.jsonl and TensorBoard's event files of the epochs, lines of history.jsonl."""
    from mnistsum_ray.reporting import report, tensorboard  # takes a moment to import, and is needed after the first epoch only

    report.write_history(folder, history)
    tensorboard.write_epochs(folder, history)


def read_history(folder: Location) -> list[dict[str, Any]]:
    """The lines of history.jsonl; none where it is missing or damaged."""
    try:
        return [json.loads(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]
    except (OSError, ValueError):
        return []


def publish_model(folder: Location, result: TrainingResult) -> dict[str, Any]:
    """Write the model folder of a run folder; return the model's description.

    FINAL_FIELDS that the folder already has for the same weights stay, so that a scoring run that has used them can be resumed.
    """
    description, place = result.description, folder / "model"
    with suppress(OSError, ValueError):  # there is no model yet, or one of another version
        published = read_description((place / WEIGHTS_FILE).read_bytes())
        if published["sha256"] == description["sha256"]:
            description |= {key: published[key] for key in FINAL_FIELDS if key in published}
    save_model(place, {name: torch.tensor(value) for name, value in result.weights.items()}, description)
    return description


def write_report(run: TrainingRun, manifest: dict[str, Any], card: dict[str, Any], result: TrainingResult) -> list[str]:
    """Write pictures, report and TensorBoard's last event file; return the names of the files that MLflow should get."""
    from mnistsum_ray.reporting import pictures, tensorboard  # a second to import, needed once
    from mnistsum_ray.reporting.model_card import MODEL_CARD, model_card

    analysis = result.error_analysis
    drawn = {
        "history.png": pictures.draw_history(result.history, card),
        "confusion.png": pictures.draw_confusion(analysis.confusion),
        "sums.png": pictures.draw_sums(analysis.sums_right, analysis.confusion),
        "reliability.png": pictures.draw_reliability(analysis.reliability()),
        "mistakes.png": pictures.draw_mistakes(analysis.as_json()["mistakes"], result.mistake_images),
    }
    for name, png in drawn.items():
        (run.folder / name).write_bytes(png)
    page = report_page(str(run.config.name), manifest, card, result.history, drawn)
    (run.folder / REPORT).write_bytes(page.encode())
    text = model_card(str(run.config.name), card, manifest["data"])
    (run.folder / "model" / MODEL_CARD).write_bytes(text.encode())
    tensorboard.write_final(run.folder, result.history[-1]["epoch"], card, drawn, manifest["config"])
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in (WEIGHTS_FILE, DESCRIPTION_FILE, MODEL_CARD))]
