"""CPU time a row on the way to a GPU and back when scoring: read, hand over, write. All but the forward pass, in one process."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.model.predictions import Predictions
from mnistsum_ray.scoring.footers import read_all_footers
from mnistsum_ray.scoring.input_columns import Columns
from mnistsum_ray.scoring.inputs import list_inputs
from mnistsum_ray.scoring.parcel import pack_parts, rows_of, unpack_predictions, with_predictions
from mnistsum_ray.scoring.parts import Part, parts_of, split_into_parts
from mnistsum_ray.scoring.provenance import PredictionSpec
from mnistsum_ray.scoring.reader import read_batches
from mnistsum_ray.scoring.worker import split_predictions
from mnistsum_ray.scoring.writer import write_part
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate

_PART_ROWS: Final = 8_192

Measurement = dict[str, float]
T = TypeVar("T")


def measure(data: str, rows: int, device: torch.device) -> Measurement:
    """Microseconds of CPU time a row, of three stages, for pairs of raw bytes in parts of 8,192 rows.

    Args:
        data: as for jobs/train.py.
        rows: number of rows.
        device: where the images go; on a CPU they are copied once, as into pinned memory.

    Returns:
        `reader_us`: read a part, decode, check and pack it. `actor_us`: unpack the images, copy them for the device, and pack
        predictions. `commit_us`: unpack the part, and write its file.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_pairs(ExportPairsConfig(data=data, output=str(folder / "pairs"), rows=rows, files=max(1, rows // 50_000)), print)
        source, output = locate(str(folder / "pairs"), "--input"), locate(str(folder / "out"), "--output")
        columns = Columns("image", "number", None)
        parts = _plan(str(folder / "pairs"), output, columns)
        parcels, reader = _timed(lambda: [pack_parts(0.0, batch) for batch in read_batches(source, parts, columns)])
        predictions = [_random_predictions(len(rows_of(parcel).numbers)) for parcel in parcels]

        def hand_over() -> list[object]:
            packed: list[object] = []
            for parcel, predicted in zip(parcels, predictions, strict=True):
                handed = rows_of(parcel)
                array_to_device(handed.images, device), array_to_device(handed.numbers, device)
                packed.append(with_predictions(parcel, 0.0, predicted))
            return packed

        _, actor = _timed(hand_over)
        spec = PredictionSpec("0" * 64, "fp32", columns, Temperatures())
        done = [with_predictions(parcel, 0.0, predicted) for parcel, predicted in zip(parcels, predictions, strict=True)]

        def commit() -> None:
            for parcel in done:
                _, batch, predicted = unpack_predictions(parcel)
                for scored in split_predictions(batch, predicted):
                    assert isinstance(scored, tuple), "every part can be read"
                    write_part(output, source, *scored, spec)

        _, writer = _timed(commit)
    return {name: seconds / rows * 1e6 for name, seconds in (("reader_us", reader), ("actor_us", actor), ("commit_us", writer))}


def _plan(folder: str, output: Location, columns: Columns) -> list[Part]:
    inputs = list_inputs((folder,), output)
    files, footers = inputs.files, read_all_footers(inputs, columns)
    for name in footers.column_names:
        files = files.append_column(name, footers[name])
    parts, _ = split_into_parts(files, _PART_ROWS)
    return parts_of(parts)


def _random_predictions(rows: int) -> Predictions:
    scores = torch.randn(rows, 10), torch.randn(rows, 19)
    return Predictions.from_scores(*scores, Temperatures(), np.zeros(rows, np.int64))


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    """The result, and the CPU time of this process in seconds."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started
