"""What an actor of Ray Data does with a task: read its parts, predict, put each, and answer."""

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

from mnistsum_ray.data.images import (
    DIGITS,
    Numbers,
    Pixels,
    ReasonCounts,
    Reasons,
    decode_images,
    decode_numbers,
    join_reasons,
)
from mnistsum_ray.data.parquet import open_parquet, read_ranges, to_parquet
from mnistsum_ray.errors import ConflictError, UnusableFileError, one_line
from mnistsum_ray.model.heads import HEADS, SUM
from mnistsum_ray.model.inference import Predictions, Predictor, append_predictions
from mnistsum_ray.model.metrics import MAX_MISTAKES
from mnistsum_ray.scoring.parts import PART_KEY, PREDICTIONS, Part
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.store import Entry

_BATCH_ROWS: Final = 2048
"""Small parts are predicted together, up to so many rows or a larger `--batch-size`: a forward pass
on ten rows, filled up to a batch, wastes most of its time."""


class Answer(NamedTuple):
    """What an actor says of its task, as a row: that it begins, what is done, that it ends."""

    task: int
    rows: int = 0  # predicted since the answer before
    rejected_rows: int = 0  # those of them that cannot be scored
    file: str = ""  # an input file that cannot be used, although its footer could be read
    reason: str = ""  # why it cannot
    ends: bool = False


class DecodedPart(NamedTuple):
    """The n rows of a part; in place of an image or a number that cannot be decoded are zeros."""

    part: Part
    table: pa.Table  # of every input column
    images: Pixels
    numbers: Numbers
    reasons: Reasons  # why each rejected row cannot be scored, by its index in the part


class ScoreParts:
    """Scores tasks in one process: the callable class of `map_batches`."""

    def __init__(self, request: ScoreRequest, device: str) -> None:
        """Load the model on `device`, `cpu` or `cuda`."""
        self._request, config = request, request.config
        self._predictor = Predictor(
            request.weights, torch.device(device), str(config.precision), config.batch_size
        )

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Take one task, which is a row, and yield its answers, each as soon as it is known.

        StorageError, RunError: the run cannot go on.
        """
        (row,) = batch.to_pylist()
        parts = [Part(**part) for part in row["parts"]]
        for answer in self._score(row["task"], parts):
            yield pa.Table.from_pylist([answer._asdict()])

    def _score(self, task: int, parts: Sequence[Part]) -> Iterator[Answer]:
        yield Answer(task)
        most_rows = max(_BATCH_ROWS, self._request.config.batch_size or 0)
        batch: list[DecodedPart] = []
        for name, group in itertools.groupby(parts, lambda part: part.input):
            try:
                for decoded in read_file(self._request, list(group)):
                    batch.append(decoded)
                    if sum(len(one.images) for one in batch) >= most_rows:
                        yield from self._predict_and_put(task, batch)
                        batch = []
            except UnusableFileError as error:
                # Parts of the file that were read before are put; the driver deletes them.
                yield Answer(task, file=name, reason=str(error))
        if batch:
            yield from self._predict_and_put(task, batch)
        yield Answer(task, ends=True)

    def _predict_and_put(self, task: int, batch: Sequence[DecodedPart]) -> Iterator[Answer]:
        """Predict the rows of several parts together, and put each part."""
        images = np.concatenate([decoded.images for decoded in batch])
        numbers = np.concatenate([decoded.numbers for decoded in batch])
        probabilities = self._request.config.probabilities
        predictions = self._predictor.predict(images, numbers, probabilities)
        rejected_rows = start = 0
        for decoded in batch:
            end = start + decoded.part.rows
            part_predictions = {name: values[start:end] for name, values in predictions.items()}
            try:
                put_part(self._request, decoded, part_predictions)
                rejected_rows += len(decoded.reasons)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                reason = f"cannot be written again: {one_line(error)}"
                yield Answer(task, file=decoded.part.input, reason=reason)
            start = end
        yield Answer(task, len(images), rejected_rows)


def read_file(request: ScoreRequest, parts: Sequence[Part]) -> Iterator[DecodedPart]:
    """Read and decode parts of one file in one pass; only the rows of one are in memory.

    UnusableFileError: it cannot be read, or decoded, although its footer could be read.
    """
    config = request.config
    file = request.root / parts[0].input
    listed = Entry(file.path, parts[0].size, parts[0].e_tag)
    ranges = [range(part.first_row, part.first_row + part.rows) for part in parts]
    with open_parquet(file, listed) as parquet:
        for part, table in zip(parts, read_ranges(parquet, ranges), strict=True):
            # Requests for an object name its ETag, but a file on a disk may be rewritten meanwhile.
            if file.is_local and file.file_entry() != listed:
                raise ConflictError  # of which open_parquet says that the file has changed
            images, bad_images = decode_images(table[config.image_column])
            numbers, bad_numbers = decode_numbers(table[config.number_column])
            yield DecodedPart(part, table, images, numbers, join_reasons(bad_images, bad_numbers))


def put_part(request: ScoreRequest, decoded: DecodedPart, predictions: Predictions) -> None:
    """Put the output file of a part if there is none. StorageError: it cannot be written."""
    part = decoded.part
    table = decoded.table.drop_columns([request.config.image_column])
    table = append_predictions(table, predictions, decoded.numbers, decoded.reasons)
    rejected = ReasonCounts()
    examples = [(part.input, part.first_row + row, why) for row, why in decoded.reasons.items()]
    rejected.add(Counter(decoded.reasons.values()), examples)
    footer: dict[str, Any] = {"run": request.run_id, "part": part._asdict()}
    footer |= {"reasons": rejected.reasons, "examples": rejected.examples}
    footer["counts"] = count_rows(decoded, predictions)
    label_column = request.config.label_column
    if label_column:
        labels, unknown = decode_numbers(decoded.table[label_column], DIGITS)
        is_known = np.ones(len(labels), bool)
        is_known[[*unknown, *decoded.reasons]] = False
        footer["counts"] |= count_right(decoded, predictions, labels, is_known)
        footer["mistakes"] = surest_mistakes(decoded, predictions, labels, is_known)
    # Not the input's metadata: Spark may have named its columns there, and would see no others.
    table = table.replace_schema_metadata({PART_KEY: json.dumps(footer)})
    with suppress(ConflictError):  # a process that died, or a second run, has put it
        (request.output / PREDICTIONS / part.output).create(to_parquet(table))


def count_rows(decoded: DecodedPart, predictions: Predictions) -> dict[str, Any]:
    """Counts of a part's rows: numbers, and lists of them by digit or by tenth of probability."""
    is_scored = np.ones(len(decoded.images), bool)
    is_scored[list(decoded.reasons)] = False
    scored = {name: values[is_scored] for name, values in predictions.items()}
    consistent = SUM.target(scored["pred_digit"], decoded.numbers[is_scored]) == scored["pred_sum"]
    top_and_bottom = decoded.images[:, [0, -1]]
    counts: dict[str, Any] = {
        "rows": len(is_scored),
        "rejected_rows": len(decoded.reasons),
        "consistent_rows": int(consistent.sum()),
        # No image of MNIST has a light edge: these are black on white.
        "light_rows": int((top_and_bottom[is_scored].mean((1, 2)) > 127).sum()),
        "predicted_digits": np.bincount(scored["pred_digit"], minlength=DIGITS).tolist(),
    }
    for head in HEADS:
        tenths = (10 * scored[f"{head.name}_prob"]).astype(np.int64).clip(max=9)
        counts[f"{head.name}_probabilities"] = np.bincount(tenths, minlength=10).tolist()
    return counts


def count_right(
    decoded: DecodedPart, predictions: Predictions, labels: Numbers, is_known: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Counts of a part's scored rows whose true digit is known: of these, how many are right."""
    labels, numbers = labels[is_known], decoded.numbers[is_known]
    counts: dict[str, Any] = {"labelled_rows": len(labels)}
    for head in HEADS:
        is_right = predictions[f"pred_{head.name}"][is_known] == head.target(labels, numbers)
        counts[f"{head.name}_right"] = int(is_right.sum())
    cells = DIGITS * labels + predictions["pred_digit"][is_known]
    counts["confusion"] = np.bincount(cells, minlength=DIGITS**2).reshape(DIGITS, -1).tolist()
    return counts


def surest_mistakes(
    decoded: DecodedPart, predictions: Predictions, labels: Numbers, is_known: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """The rows with a known digit whose wrong answers are the surest, the surest first."""
    confidence = np.zeros(len(labels))
    for head in HEADS:
        is_wrong = predictions[f"pred_{head.name}"] != head.target(labels, decoded.numbers)
        confidence = np.maximum(confidence, predictions[f"{head.name}_prob"] * is_wrong)
    confidence[~is_known] = 0
    mistakes = []
    for row in np.argsort(-confidence, kind="stable")[:MAX_MISTAKES].tolist():
        if confidence[row]:
            mistake = {"row": decoded.part.first_row + row, "confidence": confidence[row]}
            mistake |= {"digit": int(labels[row]), "number": int(decoded.numbers[row])}
            for head in HEADS:
                for name in (f"pred_{head.name}", f"{head.name}_prob"):
                    mistake[name] = predictions[name][row].item()
            mistakes.append(mistake)
    return mistakes
