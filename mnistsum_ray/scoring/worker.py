"""What a worker process does with a task: read its parts, predict, commit each part, and report.

    driver ──parts `first`..`first + count - 1`──▶ Score: read, decode, predict, commit ──reports──▶ driver

Rows stay in the process that works on them. Nothing records what is done: a part is done when its output file exists, no matter
which process wrote it or how often.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from mnistsum_ray.cluster.tasks import CAUSES, MAX_CRASHES, begin
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import DIGITS, Pixels, ReasonCounts, decode_images, decode_numbers, join_reasons, one_chunk
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.parquet import open_parquet, plain_table, read_rows, to_parquet, without_odd_years
from mnistsum_ray.data.picture import background_of
from mnistsum_ray.errors import ExistingFileError, RunError, StorageError, UnusableFileError, one_line
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.inference import Predictions, Predictor
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.counts import RowCounts, encode_image
from mnistsum_ray.scoring.parts import PREDICTIONS, REJECTED, Part, from_metadata, read_stamp, to_metadata
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location

REJECTION_FIELDS: Final = pa.schema({"source_file": pa.string(), "source_row": pa.int64(), "reason": pa.string()})
"""Columns that scoring adds to rejected rows, after the input's."""

REPORT_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # the input file
        "rows": pa.int64(),
        "rejected": pa.int64(),  # those of the rows that cannot be scored
        "started": pa.float64(),  # seconds since 1970
        "ended": pa.float64(),
        "unreadable": pa.string(),  # why the input file cannot be used
        "failed": pa.string(),  # why the run cannot go on
        "notice": pa.string(),  # a line for the console
        "warning": pa.string(),  # likewise, of which the first one is enough
    }
)
"""One row per part; and one without rows for each task that is begun again."""

_BATCH_ROWS: Final = 2048
"""Small parts are predicted together, up to this number of rows or a larger batch: a forward pass on ten rows, filled up to a
batch, wastes most of its time."""

_LOOKED_AT: Final = 100
"""Most images of a part whose background is looked at."""

_UNSURE: Final = 5
"""Least sure images in the metadata of a part; an image takes 0.4 KB."""


class Score:
    """Scores tasks, in an actor of Ray Data."""

    def __init__(self, plan: "ray.ObjectRef[Plan]", crash_counter: Any) -> None:
        """Args: the plan, whose `parts` the tasks are ranges of; and what `crash_counter` yields."""
        self._plan: Plan = ray.get(plan)
        self._crash_counter = crash_counter
        self._predictor: Predictor | None = None

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        """Score the parts of a task, a row with `first` and `count`; yield REPORT_SCHEMA.

        Errors are values and not raised: Ray Data wraps exceptions, and their types are lost on the way to the driver.
        """
        parts = [Part(**row) for row in self._plan.parts.slice(task["first"][0].as_py(), task["count"][0].as_py()).to_pylist()]
        if begin(self._crash_counter, f"task of {parts[0].output}") == 1:
            yield from self._score(parts)
            return
        # A process died in this task. Its parts are scored one by one, so that one that kills every
        # process is found and given up. The crash in the whole task counts as each part's first.
        notice = f"a process that scored died ({CAUSES}); its task is begun again at {parts[0].output}"
        yield _report(parts[0], time.time(), notice=notice)
        for part in parts:
            if begin(self._crash_counter, part.output) < MAX_CRASHES:
                yield from self._score([part])
                self._crash_counter.end.remote(part.output)
            else:
                yield _report(part, time.time(), unreadable=f"the process that scored it died {MAX_CRASHES} times ({CAUSES})")

    def _score(self, parts: list[Part]) -> Iterator[pa.Table]:
        plan, started = self._plan, time.time()
        together = max(_BATCH_ROWS, plan.config.batch_size or 0)
        batch: list[PartRows] = []
        try:
            for part, rows in read_parts(plan.inputs.root, parts, plan.config):
                if isinstance(rows, UnusableFileError):
                    yield _report(part, started, unreadable=str(rows))
                else:
                    batch.append(rows)
                if batch and (part is parts[-1] or sum(decoded.part.rows for decoded in batch) >= together):
                    # After the first read: the crash counter then also counts a process that dies while the model is loaded.
                    if self._predictor is None:
                        self._predictor, started = _make_predictor(plan), time.time()
                    for decoded, predictions in zip(batch, _predict(plan, self._predictor, batch), strict=True):
                        yield _commit(plan, decoded, predictions, started)
                    batch = []
        except StorageError as error:
            yield _report(parts[0], started, failed=f"--input {error}")
        except RunError as error:  # scores that are not finite
            yield _report(parts[0], started, failed=str(error))


def _make_predictor(plan: Plan) -> Predictor:
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    weights = {name: torch.tensor(value) for name, value in plan.weights.items()}  # a copy: arrays of Ray cannot be written
    return Predictor(weights, device, plan.precision, plan.config.batch_size)


def _report(part: Part, started: float, **fields: Any) -> pa.Table:
    row = {"name": part.name, "rows": 0, "rejected": 0, "started": started, "ended": time.time()} | fields
    return pa.Table.from_pylist([row], REPORT_SCHEMA)


@dataclass(frozen=True)
class PartRows:
    """The n rows of one part, decoded."""

    part: Part
    table: pa.Table
    """Every input column."""
    images: Pixels
    """uint8[n, 28, 28]; zeros in rejected rows."""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..NUMBERS - 1; 0 in rejected rows."""
    labels: npt.NDArray[np.int64]
    """int64[n], the true digit; -1 where it is unknown, as without a label column."""
    reasons: dict[int, str]
    """Why each rejected row cannot be scored, by its index in the part, in ascending order."""
    bad_labels: dict[int, str]
    """Likewise why each label of the other rows that is not null is no digit."""
    odd_years: int
    """INT96 timestamps that are null since their year does not fit."""


def read_parts(folder: Location, parts: list[Part], config: ScoreConfig) -> Iterator[tuple[Part, PartRows | UnusableFileError]]:
    """Read and decode parts in their order, those of one file in one pass. StorageError: the storage does not give a file.

    Yields:
        Each part, with its rows or with why they cannot be read although the footer of their file could.
    """
    for _, group in itertools.groupby(parts, lambda part: part.name):
        of_file, done = list(group), 0
        try:
            for rows in _read_file(folder, of_file, config):
                yield rows.part, rows
                done += 1
        except UnusableFileError as error:
            yield from ((part, error) for part in of_file[done:])


def _read_file(folder: Location, parts: list[Part], config: ScoreConfig) -> Iterator[PartRows]:
    """Read and decode parts of one file; only the rows of the current part are in memory.

    Whatever a file makes the decoding raise is an UnusableFileError, as what its reading does.
    """
    path = folder / parts[0].name
    rows = np.concatenate([np.arange(part.first_row, part.first_row + part.rows) for part in parts])
    with open_parquet(path, (parts[0].size, parts[0].modified)) as file:
        batches, schema = read_rows(file, rows), file.read_row_groups([]).schema
        pending: list[pa.RecordBatch] = []
        for part in parts:
            while sum(batch.num_rows for batch in pending) < part.rows:
                pending.append(next(batches))
            table = pa.Table.from_batches(pending, schema)
            rows_of_part, odd_years = without_odd_years(file, plain_table(table.slice(0, part.rows)))
            yield _decode(part, rows_of_part, config, odd_years)
            pending = table.slice(part.rows).to_batches()


def _decode(part: Part, table: pa.Table, config: ScoreConfig, odd_years: int) -> PartRows:
    images, bad_images = decode_images(one_chunk(table[config.image_column]))
    numbers, bad_numbers = decode_numbers(one_chunk(table[config.number_column]))
    reasons = join_reasons(bad_images, bad_numbers)
    labels, bad_labels = np.full(part.rows, -1), dict[int, str]()
    if config.label_column:
        column = one_chunk(table[config.label_column])
        labels, unknown = decode_numbers(column, DIGITS)
        labels[list(unknown)] = -1
        bad_labels = {row: f"the label {why}" for row, why in unknown.items() if column[row].is_valid and row not in reasons}
    return PartRows(part, table, images, numbers, labels, reasons, bad_labels, odd_years)


def _predict(plan: Plan, predictor: Predictor, batch: list[PartRows]) -> Iterator[Predictions]:
    """Predict the rows of several parts together; yield the predictions of each, those of rejected rows included."""
    predictions = predictor.predict(
        np.concatenate([rows.images for rows in batch]),
        np.concatenate([rows.numbers for rows in batch]),
        plan.config.probabilities,
    )
    end = 0
    for rows in batch:
        start, end = end, end + len(rows.numbers)
        yield predictions.slice(start, end)


def _commit(plan: Plan, rows: PartRows, predictions: Predictions, started: float) -> pa.Table:
    """Write the files of a part; return its report."""
    try:
        write_part(plan, rows, predictions)
    except (StorageError, RunError, UnusableFileError) as error:
        return _report(rows.part, started, failed=f"--output {one_line(error)}")
    except pa.ArrowException as error:
        return _report(rows.part, started, unreadable=f"cannot be written again: {one_line(error)}")
    warning = background_warning(rows, plan.card["input"]["background"])
    return _report(rows.part, started, rows=rows.part.rows, rejected=len(rows.reasons), warning=warning)


def background_warning(rows: PartRows, trained: int) -> str | None:
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


def write_part(plan: Plan, rows: PartRows, predictions: Predictions) -> None:
    """Write a part: the rejected rows first and the predictions last, so that a part is done when its predictions exist.

    Raises:
        StorageError: a file cannot be written, or another run has written another file of that name.
    """
    part, bad = rows.part, np.fromiter(rows.reasons, np.int64, len(rows.reasons))
    good = np.setdiff1d(np.arange(part.rows), bad)
    predictions = Predictions({name: values[good] for name, values in predictions.values.items()})
    source = plan.source(part.name)
    stamp = asdict(part) | {"source": source, "rejected": len(bad), "spec": plan.spec}
    metadata = to_metadata(stamp, _count(rows, good, predictions).as_json())
    if rows.reasons:
        reasons = {part.first_row + row: reason for row, reason in rows.reasons.items()}
        rejected = _rejected_table(rows.table.take(pa.array(bad)), source, reasons)
        _write(plan.held, f"{REJECTED}/{part.output}", rejected, metadata)
    table = rows.table.drop_columns([plan.config.image_column])
    table = table.take(pa.array(good)) if rows.reasons else table
    for name, values in predictions.to_arrow(rows.numbers[good]).items():
        table = table.append_column(name, values)
    _write(plan.held, f"{PREDICTIONS}/{part.output}", table, metadata)


def _count(rows: PartRows, good: npt.NDArray[np.int64], predictions: Predictions) -> RowCounts:
    """Count the rows of a part; `good` are the indices of the scored rows in it, in the order of `predictions`."""
    part, numbers, digits = rows.part, rows.numbers[good], predictions.digit
    rejected, bad_labels = (
        ReasonCounts.of({(part.name, part.first_row + row): reason for row, reason in reasons.items()})
        for reasons in (rows.reasons, rows.bad_labels)
    )
    counts = RowCounts(
        **vars(rejected),
        bad_labels=bad_labels,
        odd_years=rows.odd_years,
        consistent=int(predictions.columns(numbers)[-1].sum()),
    )
    labels = rows.labels[good]
    known = labels >= 0
    cells = np.bincount(labels[known] * DIGITS + digits[known], minlength=DIGITS * DIGITS)
    counts.confusion = cells.reshape(DIGITS, DIGITS).tolist()
    for head in HEADS:
        probability = predictions.values[f"{head.name}_prob"]
        right = predictions.values[f"pred_{head.name}"] == head.target(labels, numbers)
        counts.reliability[head.name] = Reliability.of(probability[known], right[known])
    unsure: dict[str, list[Any]] = {}
    # The same image may be there with each number.
    for place in np.argsort(predictions.digit_prob, kind="stable")[: NUMBERS * _UNSURE].tolist():
        if len(unsure) < _UNSURE and (image := encode_image(rows.images[good[place]])) not in unsure:
            where = (part.name, part.first_row + int(good[place]), int(digits[place]), int(numbers[place]))
            label = int(labels[place]) if known[place] else None
            unsure[image] = [round(float(predictions.digit_prob[place]), 3), *where, label, image]
    counts.unsure = [*unsure.values()]
    return counts


def _rejected_table(rows: pa.Table, source: str, reasons: dict[int, str]) -> pa.Table:
    """The rejected rows with REJECTION_FIELDS; `reasons` are by the index of each row in the input file."""
    # Input columns of these names are renamed to `input_<name>`; DuckDB and Spark do not tell upper case from lower case.
    names = [*rows.column_names]
    taken = {name.lower() for name in (*names, *REJECTION_FIELDS.names)}
    for place, name in enumerate(names):
        if name.lower() in REJECTION_FIELDS.names:
            while name.lower() in taken:
                name = f"input_{name}"
            taken.add(name.lower())
            names[place] = name
    table = rows.rename_columns(names)
    for field, values in zip(REJECTION_FIELDS, ([source] * len(reasons), list(reasons), list(reasons.values())), strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def _write(folder: OutputFolder, name: str, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    # The entry of Hugging Face lists the input's columns, and `datasets` refuses a file that has other columns. Rejected rows
    # that are scored again have the stamp of an earlier output.
    dropped = (b"huggingface", b"mnistsum_ray.")
    kept = {key: value for key, value in (table.schema.metadata or {}).items() if not key.startswith(dropped)}
    try:
        folder.create(name, to_parquet(table.replace_schema_metadata(kept | metadata)))
    except ExistingFileError as error:
        # An earlier process of this run may have written the same rows before it died, on other hardware with other last bits.
        with suppress(UnusableFileError):
            if read_stamp(folder.place, name)[0] == from_metadata(metadata):
                return
        raise StorageError(
            f"{(folder.place / name).display}: cannot be written: another run has written something there"
        ) from error
