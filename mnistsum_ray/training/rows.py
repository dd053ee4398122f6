"""Rows for a training worker: of each step, and of the held-out rows.

    object store ─┐                 ┌─▶ rank 0: step 0, step 1, … of every epoch
                  ├─ ReadRows ──────┤
    Parquet files ┘  (fetch.py)     └─▶ rank 1: …

Each worker has its own execution of Ray Data, which goes over the ends of the epochs. The order of every epoch is known
beforehand (data/order.py), so the first batches of the next epoch are ready before this one ends, and which rows a worker gets
depends on nothing that a scheduler decides. Ray's `streaming_split` would drop up to one row a worker, and a new execution for
each epoch would cost its start-up each time.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from mnistsum_ray.cluster.tasks import ray_data_options
from mnistsum_ray.data.order import RowRanges, Shuffle, mix_ids, positions_of_rank
from mnistsum_ray.errors import RowCountError, RunError
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.training.fetch import MAX_RETRIES, ROW_BYTES, TASK_CPUS, Columns, ReadRows, RowData, block_columns

T = TypeVar("T")

Batch = dict[str, torch.Tensor]
"""image uint8[n, 28, 28], digit int64[n], row_id int64[n]; in training also number int64[n], mixed_id int64[n]
(`order.mix_ids`) and, with --distortion, affine float32[n, AFFINE_VALUES]; all on the worker's device."""

_TASK_ROWS: Final = 32_768
"""Most rows of a task, except where a chunk of a GPU is one task: a task costs 20 ms beside its rows, and one that reads files
reads up to two row groups that it needs only some rows of. On CPUs also the rows that become tensors at once, 26 MB."""

_GPU_CHUNK_ROWS: Final = 65_536
"""Rows that are put on a GPU at once. A loop that launches ten thousand kernels a second has no time for fewer."""

_FIRST_ROWS: Final = 8192
"""Rows of the first task of all, so that the first step does not wait for an epoch's."""

_AHEAD_BYTES: Final = 64 * 2**20
"""Least memory of rows that wait for the worker."""

_TASKS_IN_FLIGHT: Final = 2
"""Tasks that an actor has at the same time: one that runs, and the next."""

_EVALUATION_BATCH: Final = 250
_GPU_EVALUATION_BATCH: Final = 2_000

_RESIDENT_ROWS: Final = 100_000
"""Held-out rows of all workers that stay on their devices, 0.8 KB each. More are read anew each time."""


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one worker, in the order of the steps."""

    data: "ray.ObjectRef[RowData]"
    shuffle: Shuffle
    distortion: float
    epochs: int
    rank: int
    world_size: int
    device: torch.device
    readers: int = 1
    """Actors that run the tasks."""
    first_epoch: int = 0

    @property
    def positions(self) -> range:
        """The positions of every batch that this worker trains on."""
        return positions_of_rank(self.shuffle.batch_size, self.rank, self.world_size)

    @cached_property
    def position_ranges(self) -> list[range]:
        """The positions, cut into those of each task: more than one where a window is larger than a task."""
        mine = self.positions
        count = min(max(1, len(mine)), -(-max(1, self.shuffle.window_steps * len(mine)) // _TASK_ROWS))
        edges = [mine.start + len(mine) * index // count for index in range(count + 1)]
        return [range(low, high) for low, high in pairwise(edges)]

    @property
    def _chunk_rows(self) -> int:
        return _GPU_CHUNK_ROWS if self.device.type == "cuda" else _TASK_ROWS

    def step_ranges(self) -> Iterator[tuple[int, range]]:
        """All remaining steps: an epoch, and those of its steps whose rows are read by tasks at once, whole windows."""
        window, steps = self.shuffle.window_steps, self.shuffle.steps
        window_rows = max(1, window * len(self.positions))
        size = window * max(1, _FIRST_ROWS // window_rows)
        for epoch in range(self.first_epoch, self.epochs):
            start = 0
            while start < steps:
                yield epoch, range(start, min(start + size, steps))
                start += size
                size = window * max(1, self._chunk_rows // window_rows)

    def batches(self) -> Iterator[Batch]:
        """The rows of each step, in the order of the positions."""
        chunks = self._on_device()
        for steps, chunk in _ahead(chunks) if self.device.type == "cuda" else chunks:
            chunk |= {"mixed_id": mix_ids(chunk["row_id"])}
            start = 0
            for step in steps:
                end = start + self.shuffle.count(range(step, step + 1), self.positions)
                yield {name: values[start:end] for name, values in chunk.items()}
                start = end

    def _on_device(self) -> Iterator[tuple[range, Batch]]:
        """Some steps at a time, and their rows."""
        blocks = self._blocks()
        # The last batch of an epoch may have fewer rows than there are workers.
        no_rows = block_columns(ReadRows(self.data, self.shuffle, self.distortion).rows(0, np.empty(0, np.int64), 0))
        for _, steps in self.step_ranges():
            columns = [next(blocks) if self.shuffle.count(steps, mine) else no_rows for mine in self.position_ranges]
            for chunk, rows in self._chunks(steps, columns):
                yield chunk, {name: array_to_device(values, self.device) for name, values in rows.items()}
        if next(blocks, None) is not None:
            raise RowCountError("there are more rows than steps")

    def _chunks(self, steps: range, columns: list[Columns]) -> Iterator[tuple[range, Columns]]:
        """Cut the rows of all position ranges at some steps into those of fewer steps."""
        together = max(1, self._chunk_rows // max(1, len(self.positions)))
        full = steps.stop - (steps.stop == self.shuffle.steps)  # the last step of an epoch may have fewer rows
        for first, end in pairwise([*range(steps.start, full, together), full, steps.stop]):
            if first == end:
                continue
            pieces = []
            for mine, values in zip(self.position_ranges, columns, strict=True):
                start = (first - steps.start) * len(mine)
                stop = start + self.shuffle.count(range(first, end), mine)
                pieces.append({name: column[start:stop] for name, column in values.items()})
            yield range(first, end), pieces[0] if len(pieces) == 1 else _side_by_side(pieces, end - first)

    def _tasks(self) -> Iterator[dict[str, int]]:
        """Tasks of `ReadRows`. Ray Data yields no empty blocks, so a task without rows is left out."""
        index = 0
        for epoch, steps in self.step_ranges():
            for mine in self.position_ranges:
                if rows := self.shuffle.count(steps, mine):
                    task = {"first_step": steps.start, "end_step": steps.stop, "first": mine.start, "end": mine.stop}
                    yield task | {"epoch": epoch, "rows": rows, "index": index}
                    index += 1

    def _blocks(self) -> Iterator[Columns]:
        """The rows of each task, in order."""
        tasks = list(self._tasks())
        if not tasks:
            return
        window_rows = self.shuffle.window_steps * len(self.positions) if self.shuffle.streamed else 0
        with ray_data_options(preserve_order=True, object_store_bytes=max(_AHEAD_BYTES, window_rows * ROW_BYTES)):
            # Not `from_arrow`: its tasks reserve a CPU each, and would wait for ever where the workers hold all CPUs.
            dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                ReadRows,
                fn_constructor_args=(self.data, self.shuffle, self.distortion),
                batch_size=1,
                num_cpus=TASK_CPUS,
                # Actors, since Ray ends the process of a task that has had no work for a second, and a new one takes two.
                compute=ActorPoolStrategy(size=min(self.readers, len(tasks)), max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT),
                max_restarts=MAX_RETRIES,
                max_task_retries=MAX_RETRIES,
            )
        dataset.set_name("train-rows")
        blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        for task, table in zip(tasks, blocks, strict=True):
            if "error" in table.column_names:
                # The storage may answer the next attempt; what is wrong in a file stays wrong.
                kind = OSError if table["type"][0].as_py() == "OSError" else RunError
                raise kind(table["error"][0].as_py())
            if (table.num_rows, table["index"][0].as_py()) != (task["rows"], task["index"]):
                raise RowCountError(f"{table.num_rows} rows of task {table['index'][0]} came in place of {task}")
            yield block_columns(table)


def _side_by_side(pieces: list[Columns], steps: int) -> Columns:
    """The rows of each step, from all pieces, which have the same number of steps."""
    return {
        name: np.concatenate(
            [piece[name].reshape(steps, len(piece[name]) // steps, *values.shape[1:]) for piece in pieces], axis=1
        ).reshape(-1, *values.shape[1:])
        for name, values in pieces[0].items()
    }


class EvaluationSet:
    """Held-out rows, undistorted and without numbers: those of one rank as batches on its device, with their digit scores.

    Each row belongs to one rank. `network` computes digit scores [n, 10] of images uint8[n, 28, 28].
    """

    def __init__(
        self,
        data: RowData,
        rows: RowRanges,
        rank: int,
        world_size: int,
        device: torch.device,
        network: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.rows = rows
        self._data = data
        self._device = device
        self._network = network
        self._indices = range(rank * len(rows) // world_size, (rank + 1) * len(rows) // world_size)
        self._resident = list(self._on_device()) if len(rows) <= _RESIDENT_ROWS else None
        self._digit_scores: list[torch.Tensor] = []

    def with_digit_scores(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batches with their digit scores [n, 10]. Those of resident rows are computed once, until `forget_scores`."""
        if self._resident is None:
            for batch in _ahead(self._on_device()):
                yield batch, self._network(batch["image"])
            return
        for index, batch in enumerate(self._resident):
            if index == len(self._digit_scores):
                self._digit_scores.append(self._network(batch["image"]))
            yield batch, self._digit_scores[index]

    def forget_scores(self) -> None:
        """Forget the digit scores: the convolutions have been trained."""
        self._digit_scores.clear()

    def _on_device(self) -> Iterator[Batch]:
        size = _GPU_EVALUATION_BATCH if self._device.type == "cuda" else _EVALUATION_BATCH
        for first in range(self._indices.start, self._indices.stop, _RESIDENT_ROWS):
            ids = self.rows.at(np.arange(first, min(first + _RESIDENT_ROWS, self._indices.stop)))
            images, digits = self._data.fetch(ids)
            columns: Columns = {"image": images, "digit": digits.astype(np.int64), "row_id": ids}
            for start in range(0, len(ids), size):
                yield {name: array_to_device(values[start : start + size], self._device) for name, values in columns.items()}


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each of which is made, in another thread, while the one before it is used."""
    done = object()
    with ThreadPoolExecutor(1) as maker:
        upcoming: Future[Any] = maker.submit(next, items, done)
        while (item := upcoming.result()) is not done:
            upcoming = maker.submit(next, items, done)
            yield item
