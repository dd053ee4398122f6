"""What an actor does with a task of Ray Data: read its parts, predict, put each, and answer."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mnistsum_ray.data.columns.base import Arrays, ReasonCounts, Reasons, decode_columns
from mnistsum_ray.data.parquet import open_parquet, read_ranges, to_parquet
from mnistsum_ray.errors import ConflictError, UnusableFileError
from mnistsum_ray.model.calls import calling
from mnistsum_ray.model.inference import Predictor, append_predictions, sum_metrics
from mnistsum_ray.scoring.parts import MIB, PART_KEY, PREDICTIONS, Part
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Entry
from mnistsum_ray.task import Task

_JOINED_BYTES: Final = 2 * MIB
"""Small parts are predicted together, up to so much or a larger batch: a forward pass on ten rows,
filled up to a batch, wastes most of its time."""


class Answer(NamedTuple):
    """What an actor says of its task, as a row: that it begins, what is done, that it ends."""

    task: int
    rows: int = 0  # predicted since the answer before
    rejected_rows: int = 0  # those of them that cannot be scored
    file: str = ""  # an input file that cannot be used, although its footer could be read
    reason: str = ""  # why it cannot
    ends: bool = False


class DecodedPart(NamedTuple):
    """The n rows of a part; in place of a value that cannot be decoded are zeros."""

    part: Part
    table: pa.Table  # of every input column
    arrays: Arrays  # inputs, and labels that flags name, by their names in the task
    reasons: Reasons  # why each rejected row cannot be scored, by its index in the part
    is_scored: npt.NDArray[np.bool_]  # the others
    is_labelled: npt.NDArray[np.bool_]  # those of them whose labels are all known


class ScoreParts:
    """Scores tasks in one process: the callable class of `map_batches`."""

    def __init__(self, request: ScoreRequest, device: str) -> None:
        """Load the model on `device`, `cpu` or `cuda`."""
        self._request = request
        settings = (str(request.config.precision), request.config.batch_size)
        self._predictor = Predictor(request.task, request.weights, torch.device(device), *settings)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Take one task, which is a row, and yield its answers, each as soon as it is known.

        StorageError, RunError: the run cannot continue.
        """
        (row,) = batch.to_pylist()
        parts = [Part(**part) for part in row["parts"]]
        for answer in self._score(row["task"], parts):
            yield pa.Table.from_pylist([answer._asdict()])

    def _score(self, task: int, parts: Sequence[Part]) -> Iterator[Answer]:
        yield Answer(task)
        most_rows = max(self._request.rows_in(_JOINED_BYTES), self._predictor.batch_size)
        # A worker that died may have put the first parts. Their answers are given again, since Ray
        # leaves out as many answers of a repeated task as there were.
        missing = rows = 0
        for number, part in enumerate(parts, 1):
            if not (self._request.output / PREDICTIONS / part.output).file_entry():
                break
            rows += part.rows
            if rows >= most_rows:
                yield Answer(task, rows)
                missing, rows = number, 0
        batch: list[DecodedPart] = []
        for name, group in itertools.groupby(parts[missing:], lambda part: part.input):
            try:
                for decoded in read_file(self._request, list(group)):
                    batch.append(decoded)
                    if sum(one.part.rows for one in batch) >= most_rows:
                        yield self._predict_and_put(task, batch)
                        batch = []
            except UnusableFileError as error:
                # Parts of the file that were read before are put; the driver deletes them.
                yield Answer(task, file=name, reason=str(error))
        if batch:
            yield self._predict_and_put(task, batch)
        yield Answer(task, ends=True)

    def _predict_and_put(self, task: int, batch: Sequence[DecodedPart]) -> Answer:
        """Predict the rows of several parts together, and put each part."""
        rows: Arrays = {}
        for key in self._request.task.inputs:
            rows[key] = np.concatenate([decoded.arrays[key] for decoded in batch])
        probabilities = self._request.config.probabilities
        predictions = self._predictor.predict(rows, probabilities=probabilities)
        start = 0
        for decoded in batch:
            end = start + decoded.part.rows
            part_predictions = {name: values[start:end] for name, values in predictions.items()}
            put_part(self._request, decoded, part_predictions)
            start = end
        return Answer(task, start, sum(len(decoded.reasons) for decoded in batch))


def read_file(request: ScoreRequest, parts: Sequence[Part]) -> Iterator[DecodedPart]:
    """Read and decode parts of one file in one pass; only the rows of one are in memory.

    UnusableFileError: it cannot be read, or decoded, although its footer could be read.
    """
    file = request.root / parts[0].input
    listed = Entry(file.path, parts[0].size, parts[0].e_tag)
    ranges = [range(part.first_row, part.first_row + part.rows) for part in parts]
    with open_parquet(file, listed) as parquet:
        tables = read_ranges(parquet, ranges, request.rows_in(8 * MIB))
        for part, table in zip(parts, tables, strict=True):
            # Requests for an object name its ETag, but a file on a disk may be rewritten meanwhile.
            if file.is_local and file.file_entry() != listed:
                raise ConflictError  # of which open_parquet says that the file has changed
            yield decode_part(request, part, table)


def decode_part(request: ScoreRequest, part: Part, table: pa.Table) -> DecodedPart:
    """Decode the inputs and labels of a part's rows."""
    names = request.names_in(table.schema)
    arrays, reasons = decode_columns(request.task.inputs, table, names, for_batch=True)
    is_scored = np.ones(part.rows, bool)
    is_scored[list(reasons)] = False
    is_labelled = is_scored & bool(request.labels)
    for key, column in request.labels.items():
        arrays[key], unknown = column.read(table[names[key]], key)
        is_labelled[list(unknown)] = False
    return DecodedPart(part, table, arrays, reasons, is_scored, is_labelled)


def put_part(request: ScoreRequest, decoded: DecodedPart, predictions: Arrays) -> None:
    """Put the output file of a part if there is none. StorageError: it cannot be written."""
    part = decoded.part
    table = decoded.table.drop_columns(request.pictures_in(decoded.table.schema))
    with calling(request.task, "predict"):  # of which a value may not fit the type in `outputs`
        table = append_predictions(request.task, table, predictions, decoded.reasons)
    rejected = ReasonCounts()
    examples = [(part.input, part.first_row + row, why) for row, why in decoded.reasons.items()]
    rejected.add(Counter(decoded.reasons.values()), examples)
    footer: dict[str, Any] = {"run": request.run_id, "part": part._asdict()}
    footer |= {"reasons": rejected.reasons, "examples": rejected.examples}
    footer |= count_part(request, decoded, predictions)
    with calling(request.task, "count or row_metrics"):  # of which a number may be infinite or NaN
        text = json.dumps(footer, allow_nan=False)
    # Not the input's metadata: Spark may have named its columns there, and would see no others.
    table = table.replace_schema_metadata({PART_KEY: text})
    with suppress(ConflictError):  # a process that died, or a second run, has put it
        (request.output / PREDICTIONS / part.output).create(to_parquet(table))


def count_part(request: ScoreRequest, decoded: DecodedPart, predictions: Arrays) -> dict[str, Any]:
    """Of a part's rows the `counts`, the machine's and the task's, and sums of the `metrics`."""
    task, arrays, is_labelled = request.task, decoded.arrays, decoded.is_labelled
    inputs = {key: arrays[key] for key in task.inputs}
    counts, metrics = count_rows(task, predictions, inputs, decoded.is_scored), {}
    if is_labelled.any():
        # What is counted of all rows is not counted again of these.
        counts = count_rows(task, predictions, arrays, is_labelled) | counts
        with calling(task, "row_metrics"):
            metrics = sum_metrics(task, predictions, arrays, is_labelled)
    counts |= {"rows": decoded.part.rows, "rejected_rows": len(decoded.reasons)}
    if request.labels:
        counts["labelled_rows"] = int(is_labelled.sum())
    return {"counts": counts, "metrics": metrics}


def count_rows(
    task: Task, predictions: Arrays, arrays: Arrays, is_counted: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Return what a task counts of some rows, if it counts and there are any."""
    if type(task).count is Task.count or not is_counted.any():  # pictures would be copied
        return {}
    predicted = {name: values[is_counted] for name, values in predictions.items()}
    batch = {key: values[is_counted] for key, values in arrays.items()}
    numbers = {}
    with calling(task, "count"):
        for name, count in task.count(predicted, batch).items():
            numbers[name] = (np.asarray(count) + 0).tolist()  # True + True is True, and 2 is meant
    return numbers
