"""What an actor of Ray Data does with a task: read its parts, predict, put each, and answer."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mnistsum_ray.data.images import Pixels, decode_images, decode_numbers, join_reasons, one_chunk
from mnistsum_ray.data.parquet import open_parquet, read_rows, to_parquet
from mnistsum_ray.errors import ConflictError, RunError, StorageError, UnusableFileError, one_line
from mnistsum_ray.model.inference import Predictions, Predictor, append_predictions
from mnistsum_ray.scoring.parts import PREDICTIONS, Part, count_part, from_row
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Entry

_BATCH_ROWS: Final = 2048
"""Small parts are predicted together, up to this number of rows or a larger batch: a forward pass
on ten rows, filled up to a batch, wastes most of its time."""

_CHANGED: Final = "has changed since the run began; run the command again"


class Answer(NamedTuple):
    """What an actor says of its task, as a row."""

    kind: Literal["begins", "scored", "unusable", "failed", "ends"]
    """The task begins or ends; parts are scored; an input file cannot be used although its footer
    could be read; the run cannot go on."""
    task: int = -1
    rows: int = 0
    rejected_rows: int = 0
    """Of parts that are scored: all rows, and those among them that are rejected."""
    file: str = ""
    """The input file that cannot be used."""
    reason: str = ""
    """Why it cannot be used, or why the run cannot go on."""


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


class ScoreParts:
    """Scores tasks in one process: the callable class of `map_batches`."""

    def __init__(self, request: ScoreRequest, device: str) -> None:
        """Load the model on `device`, `cpu` or `cuda`."""
        self._request = request
        # Ray's arrays cannot be written, so the tensors are copies.
        weights = {name: torch.tensor(value) for name, value in request.weights.items()}
        self._predictor = Predictor(
            weights, torch.device(device), str(request.precision), request.config.batch_size
        )

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Take one task, which is a row, and yield its answers, each as soon as it is known."""
        (row,) = batch.to_pylist()
        for answer in self._answers(from_row(row)):
            yield pa.Table.from_pylist([answer._replace(task=row["task"])._asdict()])

    def _answers(self, parts: Sequence[Part]) -> Iterator[Answer]:
        yield Answer("begins")
        try:
            yield from self._score(parts)
        except StorageError as error:
            yield Answer("failed", reason=f"--input {error}")
        except RunError as error:
            yield Answer("failed", reason=str(error))
        yield Answer("ends")

    def _score(self, parts: Sequence[Part]) -> Iterator[Answer]:
        most_rows = max(_BATCH_ROWS, self._request.config.batch_size or 0)
        batch: list[DecodedPart] = []
        for name, group in itertools.groupby(parts, lambda part: part.input):
            try:
                for decoded in read_file(self._request, list(group)):
                    batch.append(decoded)
                    if sum(len(decoded.images) for decoded in batch) >= most_rows:
                        yield from self._predict_and_put(batch)
                        batch = []
            except UnusableFileError as error:
                # Its parts that were read before are put all the same; the driver deletes them.
                yield Answer("unusable", file=name, reason=str(error))
        if batch:
            yield from self._predict_and_put(batch)

    def _predict_and_put(self, batch: Sequence[DecodedPart]) -> Iterator[Answer]:
        """Predict the rows of several parts together, and put each part."""
        images = np.concatenate([decoded.images for decoded in batch])
        numbers = np.concatenate([decoded.numbers for decoded in batch])
        probabilities = self._request.config.probabilities
        predictions = self._predictor.predict(images, numbers, probabilities)
        rejected_rows = 0
        start = 0
        for decoded in batch:
            end = start + decoded.part.rows
            of_part = {name: values[start:end] for name, values in predictions.items()}
            try:
                put_part(self._request, decoded, of_part)
                rejected_rows += len(decoded.reasons)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                reason = f"cannot be written again: {one_line(error)}"
                yield Answer("unusable", file=decoded.part.input, reason=reason)
            start = end
        yield Answer("scored", rows=len(images), rejected_rows=rejected_rows)


def read_file(request: ScoreRequest, parts: Sequence[Part]) -> Iterator[DecodedPart]:
    """Read and decode parts of one file in one pass; only the rows of one are in memory.

    Raises:
        StorageError: the storage does not give the file.
        UnusableFileError: it cannot be read, or decoded, although its footer could be read.
    """
    config = request.config
    file = request.root / parts[0].input
    listed = Entry(file.path, parts[0].size, parts[0].e_tag)
    ranges = [range(part.first_row, part.first_row + part.rows) for part in parts]
    with open_parquet(file, listed) as parquet:
        for part, table in zip(parts, read_rows(parquet, ranges), strict=True):
            # A file on a disk may be rewritten while it is read. Each request for an object names
            # the ETag, so the store itself sees to that.
            if file.is_local and file.status() != listed:
                raise UnusableFileError(_CHANGED)
            images, bad_images = decode_images(one_chunk(table[config.image_column]))
            numbers, bad_numbers = decode_numbers(one_chunk(table[config.number_column]))
            yield DecodedPart(part, table, images, numbers, join_reasons(bad_images, bad_numbers))


def put_part(request: ScoreRequest, decoded: DecodedPart, predictions: Predictions) -> None:
    """Put the output file of a part if there is none. RunError: it cannot be written."""
    part = decoded.part
    table = decoded.table.drop_columns([request.config.image_column])
    table = append_predictions(table, predictions, decoded.numbers, decoded.reasons)
    counts = count_part(table, part, request.config)
    # Without the input's own metadata: they may name the input's columns, and Spark sees no others.
    table = table.replace_schema_metadata(part.entries(request.run_id, counts))
    try:
        with suppress(ConflictError):  # a process that died, or a second run, has put it
            (request.output / PREDICTIONS / part.output).create(to_parquet(table))
    except StorageError as error:
        raise RunError(f"--output {error}") from None
