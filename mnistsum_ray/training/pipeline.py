"""Rows for training: read once into the object store, then given to the workers step by step.

    files ── tasks ──▶ blocks in the object store ──▶ ReadSteps ──▶ rank 0: step 0, step 1, … of every epoch
                                                 └──▶ ReadSteps ──▶ rank 1: …

Each rank has a Ray Dataset of its own, which goes over the ends of the epochs. Which rows it gets
follows from seed, epoch and row ids alone (data/order.py). `datasets` has an entry for each epoch
that a run may start from, since Ray Train makes datasets before a worker knows its checkpoint.

This module does not import torch: an actor that took a second to import it would delay the first
training rows.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy
from ray.train import DataConfig

from mnistsum_ray.cluster.tasks import ray_data_options
from mnistsum_ray.data.blocks import BadRows, Block, Digits, FileGroup
from mnistsum_ray.data.distortion import AFFINE_VALUES, distortions
from mnistsum_ray.data.images import PIXELS, SIDE, Pixels, pixels_array
from mnistsum_ray.data.order import RowIds, TrainingOrder, positions_of_rank, random_numbers
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, RowCountError, RunError

ROW_BYTES: Final = PIXELS + 1
"""Memory of a row in a block: pixels and digit."""

_FIRST_TASK_ROWS: Final = 8192
_TASK_ROWS: Final = 32_768
"""Rows of a task for one rank: 20 ms of the driver, and 26 MB. The first is smaller, so that the first step comes soon."""

_AHEAD_BYTES: Final = 64 * 2**20
"""Memory of rows that wait for a worker."""

_TASKS_IN_FLIGHT: Final = 2
"""Tasks that an actor has at the same time: one that runs, and the next."""

_RETRIES: Final = 3
"""Processes that Ray starts again for the same rows: by itself Ray Data would start new ones for ever."""


@dataclass(frozen=True)
class RowBlocks:
    """All rows, decoded, in the object store, which spills to disk what it has no memory for."""

    refs: list["ray.ObjectRef[tuple[Pixels, Digits]]"]
    bounds: RowIds
    """Block i holds the row ids bounds[i]..bounds[i + 1] - 1."""

    def fetch(self, ids: RowIds) -> tuple[Pixels, Digits]:
        """Copy rows int64[n], in any order, as uint8[n, 28, 28] and int8[n].

        Their blocks are asked for one by one, so that spilled ones do not all come back at once.
        """
        images, digits = np.empty((len(ids), SIDE, SIDE), np.uint8), np.empty(len(ids), np.int8)
        order = np.argsort(ids, kind="stable")
        edges = np.searchsorted(ids[order], self.bounds)
        for block in np.flatnonzero(np.diff(edges)):
            places = order[edges[block] : edges[block + 1]]
            rows = ids[places] - self.bounds[block]
            block_images, block_digits = ray.get(self.refs[block])
            images[places], digits[places] = block_images[rows], block_digits[rows]
        return images, digits


@dataclass(frozen=True)
class TrainingData:
    """What every worker and every reader knows of the rows."""

    blocks: RowBlocks
    order: TrainingOrder
    validation: RowIds
    test: RowIds


def load_blocks(
    source: Source, *, skip_bad_rows: bool, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[Source, RowBlocks, str]:
    """Read and decode all rows into the object store, file by file, by tasks.

    `on_progress` gets numbers of rows that have been read.

    Returns:
        The source without bad rows, the blocks, and a SHA-256 of their content and of the splits.

    Raises:
        RequestError: a file or a row cannot be used, or too few rows can.
        RunError: the storage does not give a file, or the process that reads it dies again and again.
        RowCountError: a file holds more or fewer rows than its footer says.
    """
    refs = []
    bounds = [0]
    bad: BadRows = {}
    digest = hashlib.sha256()
    for summary, ref in _read_groups(source.groups):
        first = bounds[-1]
        refs.append(ref)
        bounds.append(first + summary.rows)
        bad |= {first + row: place for row, place in summary.bad.items()}
        digest.update(summary.sha256)
        on_progress(summary.rows)
    if bounds[-1] != source.rows:
        raise RowCountError(f"--data {source.location}: read {bounds[-1]:,} rows of files that hold {source.rows:,}")
    good = source.without(bad, skip=skip_bad_rows)
    for split in (good.train, good.validation, good.test):
        digest.update(f"{len(split)} rows".encode() + split.tobytes())
    return good, RowBlocks(refs, np.array(bounds)), digest.hexdigest()


@dataclass(frozen=True)
class _Summary:
    """What the driver learns of a block."""

    rows: int
    bad: BadRows
    sha256: bytes

    @classmethod
    def of(cls, block: Block) -> "_Summary":
        digest = hashlib.sha256(block.images.tobytes())
        digest.update(block.digits.tobytes())
        return cls(len(block.digits), block.bad, digest.digest())


def _read_groups(groups: list[Block | FileGroup]) -> Iterator[tuple[_Summary, Any]]:
    """Summary and reference of each block, in the order of the rows; errors are those of `load_blocks`."""
    # No CPU is reserved, so that busy workers of another job cannot hold these tasks up.
    read = ray.remote(num_cpus=0, max_retries=_RETRIES, num_returns="streaming")(_read_group)
    ahead = max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: deque[Any] = deque()
    waiting = iter(groups)
    while True:
        while len(running) < ahead and (group := next(waiting, None)) is not None:
            running.append(group if isinstance(group, Block) else read.remote(group))
        if not running:
            return
        first = running.popleft()
        if isinstance(first, Block):
            for block in first.blocks():
                yield _Summary.of(block), ray.put((block.images, block.digits))
            continue
        for summary in first:
            try:
                yield ray.get(summary), next(first)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RequestError | RowCountError):
                    raise error.cause from None
                raise RunError(f"--data {error.cause}; nothing was begun") from error


def _read_group(group: FileGroup) -> Iterator[_Summary | tuple[Pixels, Digits]]:
    """Summary and rows of each block, in turn."""
    for block in group.blocks():
        yield _Summary.of(block)
        yield block.images, block.digits


def epochs_from(first: int, epochs: int) -> ray.data.Dataset:
    """The epochs that a run trains which starts from the epoch `first`: one row each."""
    with ray_data_options(preserve_order=True):
        return ray.data.from_items([{"epoch": epoch} for epoch in range(first, epochs)], override_num_blocks=1)


class StepsInOrder(DataConfig):
    """Gives each rank a dataset of its rows of all steps of some epochs, in their order.

    Ray's own splits would drop up to one row a worker, and promise no order.
    """

    def __init__(self, data: "ray.ObjectRef[TrainingData]", epochs: int, distortion: float, readers: int) -> None:
        super().__init__()
        self._data = data
        self._epochs = epochs
        self._distortion = distortion
        self._readers = readers

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Iterators by name, for each rank; the datasets are those of `epochs_from`."""
        order = ray.get(self._data).order
        iterators: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, epochs_left in datasets.items():
            epochs = range(self._epochs - epochs_left.count(), self._epochs)
            for rank, by_name in enumerate(iterators):
                by_name[name] = self._steps(tasks(order, epochs, world_size), rank, world_size)
        return iterators

    def _steps(self, items: list[dict[str, int]], rank: int, world_size: int) -> ray.data.DataIterator:
        with ray_data_options(preserve_order=True, object_store_bytes=_AHEAD_BYTES):
            # Not `from_arrow`: its tasks reserve a CPU each, and would wait for ever where the workers hold all CPUs.
            rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                ReadSteps,
                fn_constructor_args=(self._data, self._distortion, rank, world_size),
                batch_size=1,
                num_cpus=0,
                # Actors, since Ray ends the process of a task that has had no work for a second, and a new one takes two.
                compute=ActorPoolStrategy(size=min(self._readers, len(items)), max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT),
                max_restarts=_RETRIES,
                max_task_retries=_RETRIES,
            )
        rows.set_name("train-rows")
        return rows.iterator()


def tasks(order: TrainingOrder, epochs: range, world_size: int) -> list[dict[str, int]]:
    """Steps that are read together: an epoch, the first step, and the one after the last."""
    found = []
    rows = _FIRST_TASK_ROWS
    for epoch in epochs:
        start = 0
        while start < order.steps:
            end = start + max(1, rows * world_size // order.batch_size)
            # The last batch may have no row for some rank, and Ray Data yields no empty blocks.
            end = order.steps if end >= order.steps - 1 else end
            found.append({"epoch": epoch, "start": start, "end": end})
            start, rows = end, _TASK_ROWS
    return found


class ReadSteps:
    """Turns tasks into the rows that a rank trains on, in the order of the steps; runs in an actor.

    Holds the window of rows that it serves: at most WINDOW_BLOCKS blocks, 0.8 GB.
    """

    def __init__(self, data: "ray.ObjectRef[TrainingData]", distortion: float, rank: int, world_size: int) -> None:
        # Ray passes some arguments as references and resolves others.
        known: TrainingData = ray.get(data) if isinstance(data, ray.ObjectRef) else data
        self._blocks = known.blocks
        self._order = known.order
        self._distortion = distortion
        self._positions = positions_of_rank(self._order.batch_size, rank, world_size)
        self._window: tuple[int, ...] = ()
        self._ids: RowIds = np.empty(0, np.int64)
        self._rows: tuple[Pixels, Digits]

    def __call__(self, task: dict[str, np.ndarray]) -> pa.Table:
        """Columns `image` (784 bytes), `digit`, `number`, `row_id` and, with distortion, `affine`.

        A row's number and distortion follow from seed, epoch and row id, so a task that Ray runs
        again yields the same rows.
        """
        epoch, start, end = (int(task[name][0]) for name in ("epoch", "start", "end"))
        pieces = []
        for window, ids in self._order.rows(epoch, range(start, end), self._positions):
            self._load(window)
            places = np.searchsorted(self._ids, ids)
            images, digits = self._rows
            pieces.append(self._table(epoch, ids, images[places], digits[places]))
        return pa.concat_tables(pieces).combine_chunks()

    def _load(self, window: tuple[int, ...]) -> None:
        if window != self._window:
            self._rows = (np.empty(0, np.uint8), np.empty(0, np.int8))  # the memory of one window, not of two
            self._window, self._ids = window, self._order.rows_of(window)
            self._rows = self._blocks.fetch(self._ids)

    def _table(self, epoch: int, ids: RowIds, images: Pixels, digits: Digits) -> pa.Table:
        seed = self._order.seed
        columns = {
            "image": pixels_array(images),
            "digit": digits.astype(np.int64),
            "number": random_numbers(seed, epoch, ids).astype(np.int64),
            "row_id": ids,
        }
        if self._distortion:  # the worker distorts the images, on its device
            matrices = distortions(seed, epoch, ids, self._distortion)
            columns["affine"] = pa.FixedSizeListArray.from_arrays(pa.array(matrices.ravel()), AFFINE_VALUES)
        return pa.table(columns)
