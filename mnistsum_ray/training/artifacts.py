"""Files of a run folder for people and other programs: manifest, data files, history, model, pictures, report."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import yaml

from mnistsum_ray.cluster.resources import WorkerPlan
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.data.sources import ParquetFiles
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, UnusableFileError
from mnistsum_ray.model.folder import DESCRIPTION_FILE, WEIGHTS_FILE, read_description, save_model
from mnistsum_ray.reporting.report import REPORT, draw_pictures, report_page, versions
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.analysis import TrainingResult
from mnistsum_ray.training.preflight import CONFIG_FILE, DATA_FILES, TrainingRun

Checksums = npt.NDArray[np.int64] | None
"""Sum of the `order.row_checksums` of each file, int64[files]; None where the rows have not been read."""


def build_manifest(run: TrainingRun, checksums: Checksums, plan: WorkerPlan) -> dict[str, Any]:
    """The manifest of a starting run: config, versions, workers, and the data with their SHA-256."""
    source = run.source
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json", exclude={"resume"}),
        "versions": versions(),
        "workers": plan.describe(),
        "num_workers": plan.worker_range,
        "use_gpu": plan.use_gpu,
        "data": {
            "source": source.name,
            "location": source.location,
            "notice": source.notice,
            "sha256": None if checksums is None else source.content_sha256(checksums),
            "train_rows": len(source.train),
            "validation_rows": len(source.validation),
            "test_rows": len(source.test),
            "bad_rows": {"rows": source.bad.total} | asdict(source.bad),
        },
    }


def write_config(run: TrainingRun, folder: OutputFolder, chosen: dict[str, Any]) -> None:
    """Write config.yaml, the config of a run with what it has chosen: `--config` takes it for another run of the same kind.

    That one has a name and a place of its own.
    """
    config = run.config.model_copy(update=chosen).model_dump(mode="json", exclude={"storage_path", "name", "resume"})
    text = "# mnistsum train --config FILE trains the same again\n"
    folder.write(CONFIG_FILE, (text + yaml.safe_dump(config, sort_keys=False, allow_unicode=True)).encode())


def write_data_files(folder: OutputFolder, files: ParquetFiles, checksums: Checksums) -> None:
    """Write the files of a run, `sources.TRAINING_FILE_SCHEMA` and a column `checksum` of its rows, null where unknown."""
    column = pa.nulls(files.table.num_rows, pa.int64()) if checksums is None else pa.array(checksums)
    folder.write(DATA_FILES, to_parquet(files.table.append_column("checksum", column)))


def _read_data_files(folder: Location) -> tuple[pa.Table | None, Checksums]:
    """The files and their checksums that `write_data_files` wrote; None for each that is not known."""
    try:
        table = read_table(folder / DATA_FILES)
        checksums = table["checksum"]
    except MissingFileError:  # the source is not Parquet
        return None, None
    except (KeyError, UnusableFileError) as error:
        raise RequestError(f"--resume: {(folder / DATA_FILES).display}: {error}; start another run") from None
    return table, None if checksums.null_count else checksums.to_numpy()


def check_data(run: TrainingRun, read: Checksums, now: dict[str, Any]) -> Checksums:
    """Check that the data are those of the run that is resumed.

    `read` are the checksums of this run's rows, None where they are streamed; `now` is the entry `data` of its manifest. Returns
    the checksums that streamed rows must have; None where any may be trained on.

    Raises:
        RequestError: they are others; names a file where it can.
    """
    if run.stored is None:
        return None
    then, files = run.stored["data"], run.source.files
    advice = "name the same data, or start another run"
    table, expected = _read_data_files(run.folder)
    if files and table is not None and (read is None or expected is None):
        # Rows that were not read can only be known by their footers and, in the same place, the times of their files.
        changed = files.changed_file(table, same_place=then["location"] == run.source.location)
    elif files and read is not None and expected is not None and len(expected) == len(read) and (expected != read).any():
        changed = f"{files.location(int(np.flatnonzero(expected != read)[0])).display}: holds other rows than when the run began"
    elif now["sha256"] is None or now["sha256"] != then["sha256"]:
        raise RequestError(
            f"--resume: the data are not those of the run (SHA-256 {str(now['sha256'])[:12]}…, the run has "
            f"{str(then['sha256'])[:12]}… from {then['location']}); {advice}"
        )
    else:
        changed = None
    if changed:
        raise RequestError(f"--resume: {changed}; put it back as it was, or {advice}")
    return expected if read is None else None


def write_history(folder: OutputFolder, history: list[dict[str, Any]]) -> None:
    """Write history.jsonl and TensorBoard's event files of the epochs, lines of history.jsonl."""
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import, and is needed after the first epoch only

    folder.write("history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history).encode())
    tensorboard.write_epochs(folder, history)


def read_history(folder: Location) -> list[dict[str, Any]]:
    """The lines of history.jsonl; none where it is missing or damaged."""
    try:
        return [json.loads(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]
    except (StorageError, ValueError):
        return []


def publish_model(held: OutputFolder, result: TrainingResult) -> dict[str, Any]:
    """Write the model folder of a run folder; return the model's description.

    The weights of the same model that are there stay as they are, so that a scoring run that has used them can be resumed:
    another machine may have calibrated it otherwise. Their description is written each time: a run may have been killed before
    it was.
    """
    folder, card = held / "model", result.description
    with suppress(StorageError, ValueError, KeyError):  # there is no model yet, or one of another version
        published = read_description((folder.place / WEIGHTS_FILE).read_bytes())
        if published["trained_sha256"] == card["trained_sha256"]:
            card = published
    if card is result.description:
        save_model(folder, {name: torch.tensor(value) for name, value in result.weights.items()}, card)
    else:
        folder.write(DESCRIPTION_FILE, card)
    return card


def write_report(
    run: TrainingRun,
    held: OutputFolder,
    manifest: dict[str, Any],
    card: dict[str, Any],
    result: TrainingResult,
    say: Callable[[str], None],
) -> list[str]:
    """Write pictures, report and TensorBoard's last event file; return the names of the files that MLflow should get."""
    from mnistsum_ray.reporting import tensorboard  # takes a moment to import

    analysis = manifest["error_analysis"]
    wanted = {
        "history.png": (result.history, card),
        "confusion.png": (analysis["confusion"],),
        "mistakes.png": (analysis["mistakes"], result.mistake_images),
        "reliability.png": (analysis["probabilities"],),
    }
    drawn = draw_pictures(wanted, say)
    for name, data in drawn.items():
        held.write(name, data)
    held.write(REPORT, report_page(str(run.config.name), manifest, card, result.history, drawn).encode())
    tensorboard.write_final(held, result.history[-1]["epoch"], card)
    return [*drawn, REPORT, "history.jsonl", *(f"model/{name}" for name in (WEIGHTS_FILE, DESCRIPTION_FILE))]
