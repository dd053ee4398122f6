"""What a worker does with a task: read its parts, predict, put each part, and report."""

import itertools
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mnistsum_ray.data.images import Pixels, decode_images, decode_numbers, join_reasons, one_chunk
from mnistsum_ray.data.parquet import open_parquet, read_rows, to_parquet
from mnistsum_ray.errors import (
    ConflictError,
    RunError,
    StorageError,
    UnusableFileError,
    one_line,
)
from mnistsum_ray.model.inference import Predictions, Predictor, append_predictions
from mnistsum_ray.scoring.output import count_part
from mnistsum_ray.scoring.parts import COUNTS_KEY, PREDICTIONS, STAMP_KEY, Part
from mnistsum_ray.scoring.request import Request

_BATCH_ROWS: Final = 2048
"""Small parts are predicted together, up to this number of rows or a larger batch: a forward pass
on ten rows, filled up to a batch, wastes most of its time."""


@dataclass(frozen=True)
class Report:
    """What a worker says: a task begins or ends, parts of it are done, or the run cannot go on."""

    task: int = -1
    """Number of the task."""
    begins: Sequence[str] = ()
    """Input files of a task that begins."""
    rows: int = 0
    rejected_rows: int = 0
    """In parts that are done."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Input files that cannot be used although their footers could be read: name and reason."""
    failed: str | None = None
    """Why the run cannot go on."""
    ends: bool = False


@dataclass(frozen=True)
class DecodedPart:
    """The n rows of one part."""

    part: Part
    table: pa.Table
    """Every input column."""
    images: Pixels
    """uint8[n, 28, 28]; zeros where they cannot be decoded."""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..NUMBERS - 1; 0 where they cannot be decoded."""
    reasons: dict[int, str]
    """Why each rejected row cannot be scored, by its index in the part, in ascending order."""


class Score:
    """Scores tasks of parts in one process; an actor of Ray Data is one."""

    def __init__(self, request: Request, device: str) -> None:
        """`request.precision` is known; `device` is PyTorch's name of it."""
        self._request = request
        # Ray's arrays cannot be written, so the tensors are copies.
        weights = {name: torch.tensor(value) for name, value in request.weights.items()}
        self._predictor = Predictor(
            weights, torch.device(device), str(request.precision), request.config.batch_size
        )

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        """Take a task, a row, and give its pickled reports, a row each."""
        (row,) = task.to_pylist()
        for report in self.score(pickle.loads(row["parts"])):
            data = pickle.dumps(replace(report, task=row["task"]))
            yield pa.table({"report": [data]})

    def score(self, parts: Sequence[Part]) -> Iterator[Report]:
        """Score the parts of a task, and report."""
        yield Report(begins=sorted({part.name for part in parts}))
        try:
            yield from self._score(parts)
        except StorageError as error:
            yield Report(failed=f"--input {error}")
        except RunError as error:
            yield Report(failed=str(error))
        yield Report(ends=True)

    def _score(self, parts: Sequence[Part]) -> Iterator[Report]:
        most_rows = max(_BATCH_ROWS, self._request.config.batch_size or 0)
        batch: list[DecodedPart] = []
        for name, group in itertools.groupby(parts, lambda part: part.name):
            try:
                for decoded in read_file(self._request, list(group)):
                    batch.append(decoded)
                    if sum(decoded.part.rows for decoded in batch) >= most_rows:
                        yield self._predict_and_put(batch)
                        batch = []
            except UnusableFileError as error:
                yield Report(unusable={name: str(error)})
        if batch:
            yield self._predict_and_put(batch)

    def _predict_and_put(self, batch: list[DecodedPart]) -> Report:
        """Predict the rows of several parts together, and put each part."""
        images = np.concatenate([decoded.images for decoded in batch])
        numbers = np.concatenate([decoded.numbers for decoded in batch])
        probabilities = self._request.config.probabilities
        predictions = self._predictor.predict(images, numbers, probabilities)
        rejected_rows = 0
        unusable = {}
        start = 0
        for decoded in batch:
            end = start + decoded.part.rows
            try:
                answers = {name: values[start:end] for name, values in predictions.items()}
                put_part(self._request, decoded, answers)
                rejected_rows += len(decoded.reasons)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                unusable[decoded.part.name] = f"cannot be written again: {one_line(error)}"
            start = end
        return Report(rows=start, rejected_rows=rejected_rows, unusable=unusable)


def read_file(request: Request, parts: Sequence[Part]) -> Iterator[DecodedPart]:
    """Read and decode parts of one file in one pass; only the rows of one are in memory.

    Raises:
        StorageError: the storage does not give the file.
        UnusableFileError: it cannot be read, or decoded, although its footer could be read.
    """
    path, config = request.root / parts[0].name, request.config
    ranges = [range(part.first_row, part.first_row + part.rows) for part in parts]
    with open_parquet(path, parts[0].entry) as file:
        for part, table in zip(parts, read_rows(file, ranges), strict=True):
            images, bad_images = decode_images(one_chunk(table[config.image_column]))
            numbers, bad_numbers = decode_numbers(one_chunk(table[config.number_column]))
            yield DecodedPart(part, table, images, numbers, join_reasons(bad_images, bad_numbers))


def put_part(request: Request, decoded: DecodedPart, predictions: Predictions) -> None:
    """Put the output file of a part if there is none. RunError: it cannot be written."""
    part = decoded.part
    table = decoded.table.drop_columns([request.config.image_column])
    table = append_predictions(table, predictions, decoded.numbers, decoded.reasons)
    counts = json.dumps(count_part(table, part, request.config))
    entries = {STAMP_KEY: part.stamp(request.digest), COUNTS_KEY: counts.encode()}
    # Without the input's own metadata: they may name the input's columns, and Spark sees no others.
    data = to_parquet(table.replace_schema_metadata(entries))
    try:
        with suppress(ConflictError):  # a process that died, or a second run, has put it
            (request.output / PREDICTIONS / part.output).create(data)
    except StorageError as error:
        raise RunError(f"--output {error}") from None
