"""Streamed rows: tasks of Ray Data read, decode and permute windows of Parquet rows; a worker puts its lanes together.

The order is that of `data/windowed_shuffle.py`. What a worker holds are the windows that its lanes are in, and those that tasks
have read ahead. Neither grows with the number of rows.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from mnistsum_ray.cluster.data_context import ray_data_options
from mnistsum_ray.data.parquet_files import ParquetFiles, groups_holding
from mnistsum_ray.data.pieces import make_pieces
from mnistsum_ray.data.row_ranges import RowRanges, cut_evenly
from mnistsum_ray.data.windowed_shuffle import Window, WindowedShuffle
from mnistsum_ray.errors import RowCountError, RunError
from mnistsum_ray.training.blocks import ROW_BYTES, columns_of
from mnistsum_ray.training.in_memory import TASK_CPUS
from mnistsum_ray.training.interleave import Interleaver, LaneQueues
from mnistsum_ray.training.pipeline import Batch, split_into_steps, to_device
from mnistsum_ray.training.read_tasks import ReadWindow, read_rows, task_to_item
from mnistsum_ray.training.schedule import Schedule

AHEAD: Final = 0.5
"""Rows that tasks read ahead, as a share of the rows of all windows: what the first windows of an epoch have."""

_TASKS_PER_EXECUTION: Final = 500
"""Ray Data keeps what it knows of each task, and takes 0.5 ms a task before it starts the first one."""

_EARLY_TASKS: Final = 64
"""Tasks that are left of an execution when the next one starts; then both read ahead."""

_TASKS_IN_FLIGHT: Final = 2
"""Tasks that an actor has at the same time: one that runs, and the next."""

_HELD_OUT_TASK_ROWS: Final = 8192
_HELD_OUT_TASK_PIECES: Final = 16

_HELD_OUT_TASKS_PER_WORKER: Final = 4
"""Tasks of held-out rows for each worker, at least: with several, the shares of the workers are about equal."""


def held_rows(shuffle: WindowedShuffle, workers: int) -> int:
    """Most rows that all workers hold: the windows that they are in, and what two executions of each have read ahead."""
    return shuffle.window_rows * shuffle.lanes + 2 * workers * _ahead_rows(shuffle, workers)


def _ahead_rows(shuffle: WindowedShuffle, workers: int) -> int:
    """Rows that one execution of one worker reads ahead, at least a window."""
    return max(int(AHEAD * shuffle.window_rows * shuffle.lanes / workers), shuffle.window_rows)


@dataclass(frozen=True)
class StreamedRows:
    """Rows that are streamed from Parquet files; see `pipeline.Rows`."""

    files: ParquetFiles
    shuffle_rows: int
    readers: int = 1
    """Actors that read for one worker."""

    def lanes(self, rows: RowRanges, batch_size: int) -> int:
        """Number of lanes of a batch of training rows."""
        return self.shuffle(rows, batch_size, seed=0).lanes

    def shuffle(self, rows: RowRanges, batch_size: int, seed: int) -> WindowedShuffle:
        """The windowed shuffle of training rows."""
        return WindowedShuffle(rows, self.files.groups, batch_size, self.shuffle_rows, seed)

    def training_batches(self, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
        """This worker's share of each step of all remaining epochs, in order."""
        interleaver = Interleaver(schedule, LaneQueues(self._training_blocks(schedule)))
        batches = to_device(map(interleaver.next_chunk, schedule.chunks()), device)
        for chunk, batch in zip(schedule.chunks(), batches, strict=True):
            yield from split_into_steps(batch, schedule, chunk)

    def _training_blocks(self, schedule: Schedule) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Lane and rows of each block, in the order in which the steps need them."""
        planned: deque[tuple[int, int, int]] = deque()  # number, lane and rows of each window that is being read

        def tasks() -> Iterator[pa.Table]:
            for number, (lane, rows, task) in enumerate(self.window_tasks(schedule)):
                planned.append((number, lane, rows))
                yield task.append_column("window", pa.array(np.full(task.num_rows, number)))

        ahead = _ahead_rows(self.shuffle(schedule.rows, schedule.batch_size, schedule.seed), schedule.world_size) * ROW_BYTES
        # Actors, since Ray ends the process of a task that has had nothing to do for a second, and a new one takes two seconds.
        pool = ActorPoolStrategy(size=self.readers, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT)
        blocks = _run(tasks(), ahead, fn=ReadWindow, fn_constructor_args=(self.files.root, schedule), compute=pool)
        done = 0
        for table in blocks:
            number, lane, rows = planned[0]
            done += table.num_rows
            if done > rows or table["window"][0].as_py() != number:
                raise RowCountError(f"window {table['window'][0]} of {done} rows came in place of window {number} of {rows}")
            if done == rows:
                planned.popleft()
                done = 0
            yield lane, columns_of(table)
        if planned or done:
            raise RowCountError(f"{len(planned)} windows have not been read")

    def window_tasks(self, schedule: Schedule) -> Iterator[tuple[int, int, pa.Table]]:
        """The windows that this worker needs, in order: lane, rows that it takes, and the task that reads them."""
        shuffle = self.shuffle(schedule.rows, schedule.batch_size, schedule.seed)
        for epoch in range(schedule.first_epoch, schedule.epochs):
            for window in shuffle.windows(epoch, schedule.my_lanes, schedule.first_step_of(epoch)):
                indices = window.first + np.arange(window.rows)
                rows = int(schedule.lane_rows_taken(window.lane, indices, epoch).sum())
                if rows:
                    yield window.lane, rows, self._window_task(schedule.rows, epoch, window)

    def _window_task(self, rows: RowRanges, epoch: int, window: Window) -> pa.Table:
        groups, skips, counts = np.array(window.slices, np.int64).T
        first = rows.count_below(self.files.groups.bounds[groups]) + skips
        task = make_pieces(self.files, groups, rows.at(first), rows.at(first + counts - 1) + 1)
        for name, value in (("epoch", epoch), ("lane", window.lane), ("first", window.first)):
            task = task.append_column(name, pa.array(np.full(len(groups), value)))
        return task

    def in_order(self, rows: RowRanges, batch_rows: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """This worker's share of some rows: every `world_size`-th of the tasks that read them."""
        if not len(rows):
            return
        task_rows = min(_HELD_OUT_TASK_ROWS, -(-len(rows) // (_HELD_OUT_TASKS_PER_WORKER * world_size)))
        tasks = islice(self._held_out_tasks(rows, task_rows), rank, None, world_size)
        ahead = 4 * _HELD_OUT_TASK_ROWS * ROW_BYTES
        for table in _run(tasks, ahead, fn=read_rows, fn_args=(self.files.root, rows), compute=TaskPoolStrategy(self.readers)):
            columns = columns_of(table)
            for start in range(0, table.num_rows, batch_rows):
                yield {name: values[start : start + batch_rows] for name, values in columns.items()}

    def _held_out_tasks(self, rows: RowRanges, task_rows: int) -> Iterator[pa.Table]:
        groups, first_ids, _, counts = groups_holding(self.files.groups, rows)
        piece, first, end = cut_evenly(counts, task_rows)  # a piece of many rows is read in slices
        before = rows.count_below(first_ids)[piece]
        low, high = before + first, before + end
        start, wanted = 0, 0
        for index, count in enumerate((high - low).tolist()):
            if index > start and (wanted + count > task_rows or index - start == _HELD_OUT_TASK_PIECES):
                part = slice(start, index)
                yield make_pieces(self.files, groups[piece[part]], rows.at(low[part]), rows.at(high[part] - 1) + 1)
                start, wanted = index, 0
            wanted += count
        part = slice(start, None)
        yield make_pieces(self.files, groups[piece[part]], rows.at(low[part]), rows.at(high[part] - 1) + 1)

    def sample(self, rows: RowRanges, limit: int) -> RowRanges:
        """At most `limit` of the rows, from row groups that are evenly spaced."""
        return self.files.groups.sample(rows, limit)


def _run(tasks: Iterator[pa.Table], ahead: int, **map_arguments: Any) -> Iterator[pa.Table]:
    """The blocks that a function returns for each task, in order.

    They come from several executions of Ray Data. The next one starts while the last tasks of this one are read, so that
    nothing waits for its actors.
    """
    batches = iter(lambda: list(islice(tasks, _TASKS_PER_EXECUTION)), [])

    def start() -> tuple[int, Iterator[pa.Table]]:
        tables = next(batches, [])
        if not tables:
            return 0, iter(())
        blocks = _execute(tables, ahead, map_arguments)
        return len(tables), chain([next(blocks)], blocks)

    with ThreadPoolExecutor(1) as starter:
        count, blocks = start()
        while count:
            upcoming: Future[tuple[int, Iterator[pa.Table]]] | None = None
            for index, table in enumerate(blocks):
                if upcoming is None and index >= count - _EARLY_TASKS:
                    upcoming = starter.submit(start)
                yield table
            assert upcoming is not None, "each task returns a block"
            count, blocks = upcoming.result()


def _execute(tables: list[pa.Table], ahead: int, map_arguments: dict[str, Any]) -> Iterator[pa.Table]:
    """The blocks of one execution; a task is a table of pieces."""
    # Not `from_arrow`: its tasks reserve a CPU each, and would wait for ever where the workers hold all CPUs.
    items = list(map(task_to_item, tables))
    with ray_data_options(preserve_order=True, object_store_bytes=ahead):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            **map_arguments, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS
        )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if "error" in table.column_names:
            # The storage may answer the next attempt; what is wrong in a file stays wrong.
            raise (OSError if table["may_pass"][0].as_py() else RunError)(table["error"][0].as_py())
        yield table
