"""Rows for the workers, step by step: a Ray Dataset for each rank, given to Ray Train.

    files ── tasks ──▶ blocks in the object store ──▶ ReadSteps ──▶ rank 0: step 0, step 1, …
                                                 └──▶ ReadSteps ──▶ rank 1: step 0, step 1, …

A dataset goes on over the ends of the epochs. Which rows it gives follows from seed, epoch and row
ids alone (data/randomness.py). A worker knows only from its checkpoint which epoch it starts with, so it
asks Ray Train for a dataset by the name of that epoch, and `StepsInOrder` then makes that one.

This module does not import torch: an actor that took a second to import it would delay the first
training rows.
"""

from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.train import DataConfig

from mnistsum_ray.cluster.nodes import set_data_options
from mnistsum_ray.data.images import Pixels, pixels_array
from mnistsum_ray.data.randomness import (
    AFFINE_VALUES,
    RowIds,
    TrainingOrder,
    distortions,
    positions_of_rank,
    random_numbers,
)
from mnistsum_ray.data.sources import Digits
from mnistsum_ray.training.rows import TrainingData

_FIRST_TASK_ROWS: Final = 8192
_TASK_ROWS: Final = 32_768
"""Rows of a task for one rank: 20 ms of the driver, and 26 MB. The first has fewer, so that the
first step comes soon."""

_AHEAD_BYTES: Final = 64 * 2**20
"""Memory of rows that wait for a worker."""

_RETRIES: Final = 3
"""Starts of an actor after a failure: by itself Ray Data would start new ones for ever."""

_START: Final = "from epoch "


def start_name(epoch: int) -> str:
    """Name of the dataset of workers that start with this epoch, counted from 0."""
    return f"{_START}{epoch}"


def start_points(epochs: range) -> dict[str, ray.data.Dataset]:
    """What `TorchTrainer` takes as `datasets`: the epochs that its workers may start with, by name.

    Nobody reads the Datasets: `StepsInOrder` makes others, from the names.
    """
    placeholder = ray.data.from_items([0])
    return {start_name(epoch): placeholder for epoch in epochs}


class StepsInOrder(DataConfig):
    """Gives each rank a dataset of its rows of all steps of some epochs, in their order.

    Ray's own splits would drop up to one row a worker, and promise no order.
    """

    def __init__(
        self, data: "ray.ObjectRef[TrainingData]", epochs: int, distortion: float, readers: int
    ) -> None:
        super().__init__()
        self._data = data
        self._epochs = epochs
        self._distortion = distortion
        self._readers = readers

    def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Iterators by name, for each rank, of the `start_points` that workers ask for."""
        order = ray.get(self._data).order
        iterators: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name in datasets:
            epochs = range(int(name.removeprefix(_START)), self._epochs)
            items = tasks(order, epochs, world_size)
            # Not `from_arrow`: its tasks reserve a CPU each, and would wait for ever where the
            # workers hold all CPUs.
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            set_data_options(dataset, preserve_order=True, object_store_bytes=_AHEAD_BYTES)
            for rank in range(world_size):
                iterators[rank][name] = self._read_steps(dataset, len(items), rank, world_size)
        return iterators

    def _read_steps(
        self, dataset: ray.data.Dataset, count: int, rank: int, world_size: int
    ) -> ray.data.DataIterator:
        """The rows of one rank, of a dataset of so many tasks."""
        # Actors, since Ray ends the process of a task that has had no work for a second, and a
        # new one takes two.
        actors = ActorPoolStrategy(
            size=min(self._readers, count),
            max_tasks_in_flight_per_actor=2,  # the one that runs, and the next
        )
        rows = dataset.map_batches(
            ReadSteps,
            fn_constructor_args=(self._data, self._distortion, rank, world_size),
            batch_size=1,
            num_cpus=0,
            compute=actors,
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
            end = min(order.steps, start + max(1, rows * world_size // order.batch_size))
            found.append({"epoch": epoch, "start": start, "end": end})
            start, rows = end, _TASK_ROWS
    return found


class ReadSteps:
    """Turns tasks into the rows that a rank trains on, in the order of the steps; an actor.

    Holds the window of rows that it serves: at most WINDOW_BLOCKS blocks, 0.8 GB.
    """

    def __init__(
        self, data: "ray.ObjectRef[TrainingData]", distortion: float, rank: int, world_size: int
    ) -> None:
        # Ray passes some arguments as references and resolves others.
        known: TrainingData = ray.get(data) if isinstance(data, ray.ObjectRef) else data
        self._blocks = known.blocks
        self._order = known.order
        self._distortion = distortion
        self._positions = positions_of_rank(self._order.batch_size, rank, world_size)
        self._window: tuple[int, ...] = ()
        self._ids: RowIds = np.empty(0, np.int64)
        self._rows: tuple[Pixels, Digits] | None = None

    def __call__(self, task: dict[str, np.ndarray]) -> pa.Table:
        """Columns `image` (784 bytes), `digit`, `number`, `row_id` and, with distortion, `affine`.

        A row's number and distortion follow from seed, epoch and row id, so a task that Ray runs
        again yields the same rows.
        """
        epoch, start, end = (int(task[name][0]) for name in ("epoch", "start", "end"))
        pieces = []
        for window, ids in self._order.row_ids_of_steps(epoch, range(start, end), self._positions):
            images, digits = self._rows_of(window)
            places = np.searchsorted(self._ids, ids)
            pieces.append(self._table(epoch, ids, images[places], digits[places]))
        return pa.concat_tables(pieces).combine_chunks()

    def _rows_of(self, window: tuple[int, ...]) -> tuple[Pixels, Digits]:
        if self._rows is None or window != self._window:
            self._rows = None  # there is memory for one window, not for two
            self._window, self._ids = window, self._order.row_ids_of_window(window)
            self._rows = self._blocks.fetch(self._ids)
        return self._rows

    def _table(self, epoch: int, ids: RowIds, images: Pixels, digits: Digits) -> pa.Table:
        seed = self._order.seed
        columns = {
            "image": pixels_array(images),
            "digit": digits.astype(np.int64),
            "number": random_numbers(seed, epoch, ids).astype(np.int64),
            "row_id": ids,
        }
        if self._distortion:  # the worker distorts the images, on its device
            values = pa.array(distortions(seed, epoch, ids, self._distortion).ravel())
            columns["affine"] = pa.FixedSizeListArray.from_arrays(values, AFFINE_VALUES)
        return pa.table(columns)
