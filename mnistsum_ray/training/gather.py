"""Functions of Ray Data's tasks for rows in memory: read parts of the source, and take rows out of the object store.

This module does not import torch: a task process that took a second to import it would delay the first training rows.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.parts import ParquetPart
from mnistsum_ray.data.pixels import IMAGE_TYPE, SIDE, Pixels
from mnistsum_ray.data.sampling import RowIds, random_numbers
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.blocks import block_of, digits_of, images_of
from mnistsum_ray.training.schedule import Chunk, Schedule


def read_source_part(batch: pa.Table, parts: tuple[ParquetPart, ...]) -> pa.Table:
    """Read the part of the source whose index is in the batch: columns `image`, `digit` and `error`.

    `error` is null unless the part cannot be used. It is a column because Ray Data wraps an exception on its way to the driver,
    where its type, and with it the exit code, would be lost.
    """
    part = parts[batch["part"][0].as_py()]
    try:
        return part.read().append_column("error", pa.nulls(part.rows, pa.string()))
    except RequestError as error:
        return pa.table(
            {"image": pa.array([bytes(SIDE * SIDE)], IMAGE_TYPE), "digit": pa.array([0], pa.int8()), "error": [str(error)]}
        )


class Gather:
    """Random access to rows in the object store."""

    def __init__(self, blocks: "list[ray.ObjectRef[pa.Table]]", first_ids: RowIds) -> None:
        """Take blocks and the row id of the first row of each, in ascending order."""
        self._blocks, self._first_ids = blocks, first_ids
        self._opened: dict[int, tuple[Pixels, npt.NDArray[np.int8]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Gather, (self._blocks, self._first_ids)  # another process opens the blocks itself

    def __call__(self, row_ids: RowIds) -> dict[str, np.ndarray]:
        """Rows int64[n] in any order as `image` uint8[n, 28, 28], `digit` int64[n] and `row_id` int64[n]."""
        images = np.empty((len(row_ids), SIDE, SIDE), np.uint8)
        digits = np.empty(len(row_ids), np.int64)
        block_indices = np.searchsorted(self._first_ids, row_ids, side="right") - 1
        by_block = np.argsort(block_indices, kind="stable")
        indices, starts = np.unique(block_indices[by_block], return_index=True)
        for index, places in zip(indices.tolist(), np.split(by_block, starts[1:]), strict=True):
            rows = row_ids[places] - self._first_ids[index]
            block_images, block_digits = self._open(index)
            images[places] = block_images[rows]
            digits[places] = block_digits[rows]
        return {"image": images, "digit": digits, "row_id": row_ids}

    def _open(self, index: int) -> tuple[Pixels, npt.NDArray[np.int8]]:
        """Images and digits of a block in shared memory, kept open: to get each block for each chunk took most of the time."""
        if index not in self._opened:
            table: pa.Table = ray.get(self._blocks[index])
            self._opened[index] = images_of(table), digits_of(table)
        return self._opened[index]


class GatherChunk:
    """Gathers the rows of chunks, in an actor."""

    def __init__(self, gather: Gather, schedule: Schedule) -> None:
        self._gather, self._schedule = gather, schedule

    def __call__(self, task: dict[str, np.ndarray]) -> pa.Table:
        """Rows of one chunk as a block: `image`, `digit`, `row_id` and `number` and, to distort, `affine`.

        A row's number and distortion follow from (seed, epoch, row id), so a task that Ray runs again yields the same rows.
        """
        schedule, chunk = self._schedule, Chunk(*(int(task[name][0]) for name in ("epoch", "first", "last")))
        rows = schedule.permuted_ids(chunk)
        batch = self._gather(rows)
        batch["number"] = random_numbers(schedule.seed, chunk.epoch, rows)
        if schedule.distortion:  # the worker distorts the images, on its device
            batch["affine"] = distortions(schedule.seed, chunk.epoch, rows, schedule.distortion)
        return block_of(batch)
