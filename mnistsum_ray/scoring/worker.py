"""What a worker process does with a task: read its parts, predict, put each part, and report.

Nothing records what is done: a part is done when its output file exists, no matter which process wrote it, or how often.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mnistsum_ray.data.images import Pixels, decode_images, decode_numbers, join_reasons, one_chunk
from mnistsum_ray.data.parquet import open_parquet, read_rows, to_parquet
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import ExistingFileError, RunError, StorageError, UnusableFileError, one_line
from mnistsum_ray.model.inference import Predictions, Predictor
from mnistsum_ray.scoring.actor import Report
from mnistsum_ray.scoring.counts import RowCounts, columns_to_count, count_part
from mnistsum_ray.scoring.output import count_part_file
from mnistsum_ray.scoring.parts import PREDICTIONS, Part
from mnistsum_ray.scoring.request import Request
from mnistsum_ray.storage.store import Entry

_BATCH_ROWS: Final = 2048
"""Small parts are predicted together, up to this number of rows or a larger batch: a forward pass on ten rows, filled up to a
batch, wastes most of its time."""

_LOOKED_AT: Final = 100
"""Most images of a part whose background is looked at."""


class Scorer:
    """Scores tasks of parts in one process."""

    def __init__(self, request: Request, device: str) -> None:
        """`request.precision` is known; `device` is PyTorch's name of it."""
        self._request = request
        weights = {name: torch.tensor(value) for name, value in request.weights.items()}  # Ray's arrays cannot be written
        self._predictor = Predictor(weights, torch.device(device), str(request.precision), request.config.batch_size)

    def score(self, parts: Sequence[Part]) -> Iterator[Report]:
        """Score the parts of a task, and report."""
        started = time.time()
        together = max(_BATCH_ROWS, self._request.config.batch_size or 0)
        batch: list[DecodedPart] = []
        try:
            for part, decoded in read_parts(self._request, parts):
                if isinstance(decoded, UnusableFileError):
                    yield Report(unusable={part.name: str(decoded)})
                else:
                    batch.append(decoded)
                if batch and (part is parts[-1] or sum(rows.part.rows for rows in batch) >= together):
                    yield replace(self._predict_and_put(batch), started=started, ended=time.time())
                    batch = []
        except StorageError as error:
            yield Report(failed=f"--input {error}")
        except RunError as error:
            yield Report(failed=str(error))
        yield Report(ends=True)

    def _predict_and_put(self, batch: "list[DecodedPart]") -> Report:
        """Predict the rows of several parts together, and put each part."""
        images = np.concatenate([rows.images for rows in batch])
        numbers = np.concatenate([rows.numbers for rows in batch])
        predictions = self._predictor.predict(images, numbers, self._request.config.probabilities)
        counts = RowCounts()
        unusable = {}
        warning = None
        end = 0
        for rows in batch:
            start, end = end, end + rows.part.rows
            try:
                counts.add(put_part(self._request, rows, predictions.slice(start, end)))
            except pa.ArrowException as error:
                if isinstance(error, MemoryError):
                    raise
                unusable[rows.part.name] = f"cannot be written again: {one_line(error)}"
            warning = warning or background_warning(rows, self._request.card["input"]["background"])
        return Report(counts=counts, unusable=unusable, warning=warning)


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


def read_parts(request: Request, parts: Sequence[Part]) -> Iterator[tuple[Part, DecodedPart | UnusableFileError]]:
    """Read and decode parts in their order, those of one file in one pass. StorageError: the storage does not give a file.

    Yields:
        Each part, with its rows or with why they cannot be read although the footer of their file could.
    """
    for _, group in itertools.groupby(parts, lambda part: part.name):
        of_file = list(group)
        done = 0
        try:
            for decoded in _read_file(request, of_file):
                yield decoded.part, decoded
                done += 1
        except UnusableFileError as error:
            yield from ((part, error) for part in of_file[done:])


def _read_file(request: Request, parts: Sequence[Part]) -> Iterator[DecodedPart]:
    """Read and decode parts of one file; only the rows of the current part are in memory.

    Whatever a file makes the decoding raise is an UnusableFileError, as what its reading does.
    """
    path = request.root / parts[0].name
    stop = parts[-1].first_row + parts[-1].rows
    with open_parquet(path, Entry(path.path, parts[0].size, parts[0].e_tag)) as file:
        schema = file.read_row_groups([]).schema
        end = -1
        for part in parts:
            if part.first_row != end:  # the first, or one after parts that are done already
                batches = read_rows(file, range(part.first_row, stop))
                pending: list[pa.RecordBatch] = []
            while sum(batch.num_rows for batch in pending) < part.rows:
                pending.append(next(batches))
            table = pa.Table.from_batches(pending, schema)
            yield _decode(request, part, table.slice(0, part.rows))
            pending = table.slice(part.rows).to_batches()
            end = part.first_row + part.rows


def _decode(request: Request, part: Part, table: pa.Table) -> DecodedPart:
    images, bad_images = decode_images(one_chunk(table[request.config.image_column]))
    numbers, bad_numbers = decode_numbers(one_chunk(table[request.config.number_column]))
    return DecodedPart(part, table, images, numbers, join_reasons(bad_images, bad_numbers))


def background_warning(rows: DecodedPart, trained: int) -> str | None:
    """What to say where most images of a part have another background, 0 or 255, than those that the model was trained on."""
    good = np.setdiff1d(np.arange(rows.part.rows), [*rows.reasons])
    images = rows.images[good[:: 1 + len(good) // _LOOKED_AT]]
    if not len(images) or background_of(images) == trained:
        return None
    here, there = ("dark on light", "light on dark") if trained == 0 else ("light on dark", "dark on light")
    return (
        f"warning: {rows.part.name}: its images are {here}, and the model was trained on {there}, so most answers are wrong; "
        f"invert the images (255 - pixel), or train on such images"
    )


def put_part(request: Request, rows: DecodedPart, predictions: Predictions) -> RowCounts:
    """Put the output file of a part if there is none; return the counts of its rows.

    RunError: it cannot be written.
    """
    reasons = pa.array([rows.reasons.get(row) for row in range(rows.part.rows)], pa.string())
    rejected = reasons.is_valid().to_numpy(zero_copy_only=False)
    table = rows.table.drop_columns([request.config.image_column])
    for name, values in predictions.to_arrow(rows.numbers, rejected).items():
        table = table.append_column(name, values)
    table = table.append_column("reason", reasons)
    # Without the input's own metadata, beside which Spark would see no other columns than theirs.
    table = table.replace_schema_metadata(rows.part.stamp(request.digest))
    try:
        (request.output / PREDICTIONS / rows.part.output).create(to_parquet(table))
    except ExistingFileError:
        # Of a process that died, or of a second run: on other hardware the last bits may be others.
        return count_part_file(request, rows.part)
    except StorageError as error:
        raise RunError(f"--output {error}") from None
    return count_part(table.select(columns_to_count(request.config)), rows.part, request.config)
