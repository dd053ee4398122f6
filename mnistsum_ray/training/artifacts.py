"""Files of a run folder for people and other programs: manifest, model, history, pictures, report."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray.train

from mnistsum_ray.data.parquet_files import ParquetFiles
from mnistsum_ray.model.serialization import MODEL_FILES
from mnistsum_ray.reporting.report import REPORT, report_page, write_history
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.preflight import TrainingRun

DATA_FILES: Final = "data_files.parquet"
"""`parquet_files.FILE_SCHEMA` of the files that a run streams."""

FINAL_FIELDS: Final = ("temperature", "probabilities", "int8")
"""Fields of model.json that are known only after training."""


def build_manifest(run: TrainingRun, fingerprint: str, workers: str) -> dict[str, Any]:
    """The manifest of a starting run: config, versions, workers in words, and the data with their SHA-256."""
    source = run.source
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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


def write_data_files(folder: Location, files: ParquetFiles) -> None:
    """Write down the files that a run streams, so that a resumed run can name one that has changed."""
    sink = pa.BufferOutputStream()
    pq.write_table(files.table, sink)
    (folder / DATA_FILES).write_bytes(sink.getvalue())


def publish_model(
    folder: Location, checkpoint: ray.train.Checkpoint, history: list[dict[str, Any]], final: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Copy the best model of a checkpoint and the history into the run folder.

    Args:
        folder: the run folder.
        checkpoint: its folder also holds the best model so far.
        history: lines of history.jsonl.
        final: FINAL_FIELDS for model.json, at the end of training. Values that model.json already has for the same weights stay,
            so that a scoring run that has used them can be resumed.

    Returns:
        The contents of model.json.
    """
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import, and is needed after the first epoch only

    weights_name, card_name = MODEL_FILES
    with checkpoint.as_directory() as local:
        card: dict[str, Any] = json.loads((Path(local) / card_name).read_text())
        target = folder / "model" / card_name
        published = target.read_json() if target.exists() else {}
        keep = published.get("sha256") == card["sha256"] and "probabilities" in published
        (folder / "model" / weights_name).write_bytes((Path(local) / weights_name).read_bytes())
    card |= (final or {}) | {key: published[key] for key in FINAL_FIELDS if keep and key in published}
    target.write_json(card)
    write_history(folder, history)
    tensorboard.write_epochs(folder, history)
    return card


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
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in (*MODEL_FILES, MODEL_CARD))]
