"""Files of a run folder for people and other programs: manifest, model, history, pictures, report."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.parquet_source import ParquetFiles
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.model.serialization import DESCRIPTION_FILE, WEIGHTS_FILE, read_description, save_model
from mnistsum_ray.reporting.report import REPORT, report_page
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.resources import ResourcePlan

Checksums = npt.NDArray[np.int64] | None

DATA_FILES: Final = "data_files.parquet"
"""`parquet_source.FILE_SCHEMA` of the files of a run, and a column `checksum`: of the rows of each, null until they are known."""


def build_manifest(run: TrainingRun, checksums: Checksums, plan: ResourcePlan) -> dict[str, Any]:
    """The manifest of a starting run: config, versions, workers, and the data with their SHA-256.

    `checksums` are those of the rows of each file, int64[files]; None for rows that are streamed, and have not been read.
    """
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
            "sha256": None if checksums is None else source.content_sha256(checksums),
            "footers_sha256": source.files.fingerprint(source.splits) if source.files else None,
            "train_rows": len(source.train),
            "validation_rows": len(source.validation),
            "test_rows": len(source.test),
        },
    }


def write_data_files(folder: Location, files: ParquetFiles, checksums: Checksums) -> None:
    """Write down the files of a run, so that another one can name a file that has changed."""
    column = pa.nulls(files.table.num_rows, pa.int64()) if checksums is None else pa.array(checksums)
    (folder / DATA_FILES).write_bytes(to_parquet(files.table.append_column("checksum", column)))


def read_data_files(folder: Location, flag: str) -> tuple[pa.Table | None, Checksums]:
    """What `write_data_files` wrote: the files and their checksums, None for each where it is not known.

    Raises:
        RequestError: it is damaged; the message begins with `flag`.
    """
    try:
        table = pq.read_table(pa.BufferReader((folder / DATA_FILES).read_bytes()))
        checksums = table["checksum"]
    except FileNotFoundError:  # of a run that was killed before, or whose source is not Parquet
        return None, None
    except (KeyError, pa.ArrowException) as error:
        raise RequestError(
            f"{flag}: {(folder / DATA_FILES).display} cannot be read: {one_line(error)}; start another run"
        ) from None
    return table, None if checksums.null_count else checksums.to_numpy()


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
    """Write the model folder of a run folder, unless it holds the same weights already; return the model's description.

    A model that is there stays as it is, so that a scoring run that has used it can be resumed: another machine may have
    calibrated it otherwise.
    """
    place = folder / "model"
    with suppress(OSError, ValueError):  # there is no model yet, or one of another version
        published = read_description((place / WEIGHTS_FILE).read_bytes())
        if published["sha256"] == result.description["sha256"]:
            return published
    save_model(place, {name: torch.tensor(value) for name, value in result.weights.items()}, result.description)
    return result.description


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
