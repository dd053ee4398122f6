"""Which rows a worker sees at which step, and how they are taken out of the blocks: what Ray Data's tasks carry out.

No torch here: a process that takes a second to import it would have training wait for its first rows.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.errors import Refusal
from mnistsum_ray.mnist import ParquetPart
from mnistsum_ray.pairs import Rows, distortions, epoch_order, random_numbers, rank_share, shifts, steps_per_epoch
from mnistsum_ray.schema import IMAGE_TYPE, SIDE, Pixels, one_chunk, pixels_view

_TASK_ROWS: Final = 4096
"""Rows that one gather task yields: 3 MB, some tens of milliseconds."""


def read_part(batch: pa.Table, parts: tuple[ParquetPart, ...]) -> pa.Table:
    """Read the part whose index the batch names: `image`, `digit`, and `refusal`, null unless the part cannot be used."""
    part = parts[batch["part"][0].as_py()]
    # Ray Data wraps an exception and loses its type on the way to the driver, so what a user did wrong travels as a value.
    try:
        return part.read().append_column("refusal", pa.nulls(part.rows, pa.string()))
    except Refusal as refusal:
        return pa.table(
            {"image": pa.array([bytes(SIDE * SIDE)], IMAGE_TYPE), "digit": pa.array([0], pa.int8()), "refusal": [str(refusal)]}
        )


def images_of(table: pa.Table) -> Pixels:
    """The column `image` of n rows as uint8[n, 28, 28], without a copy where it lies in one piece."""
    return pixels_view(one_chunk(table["image"]))


def digits_of(table: pa.Table) -> npt.NDArray[np.int8]:
    """The column `digit` as int8[n]."""
    return table["digit"].to_numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Schedule:
    """What one worker is to see, and in which order: pure arithmetic, the same wherever it is worked out."""

    row_ids: Rows
    """The training rows, ascending."""
    batch_size: int
    seed: int
    max_shift: int
    distortion: float
    first_epoch: int
    first_step: int
    """Of the first epoch; the later ones begin at 0."""
    epochs: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps an epoch, the same on every worker."""
        return steps_per_epoch(len(self.row_ids), self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch at this step of an epoch."""
        return min(self.batch_size, len(self.row_ids) - step * self.batch_size)

    def share_rows(self, step: int) -> int:
        """Rows of this worker's share of that batch; the last one may be empty."""
        return len(range(self.rank, self.batch_rows(step), self.world_size))

    def tasks(self) -> list[dict[str, int]]:
        """Consecutive steps, put together so that a task is worth its overhead and never spans two epochs."""
        stride = max(1, _TASK_ROWS * self.world_size // self.batch_size)
        return [
            {"epoch": epoch, "first": first, "last": min(first + stride, self.steps)}
            for epoch in range(self.first_epoch, self.epochs)
            for first in range(self.first_step if epoch == self.first_epoch else 0, self.steps, stride)
        ]

    def task_rows(self, task: dict[str, int]) -> int:
        """Rows of this worker's shares of all steps of a task."""
        return sum(self.share_rows(step) for step in range(task["first"], task["last"]))

    def rows(self, epoch: int, first: int, last: int) -> Rows:
        """The rows of this worker's shares of steps first..last-1, one after the other."""
        order = epoch_order(self.seed, epoch, self.row_ids)
        batches = (order[step * self.batch_size : (step + 1) * self.batch_size] for step in range(first, last))
        return np.concatenate([rank_share(batch, self.rank, self.world_size) for batch in batches])


class Gather:
    """Takes rows out of the blocks, wherever in the object store they lie."""

    def __init__(self, images: MaterializedDataset) -> None:
        self._blocks: list[ray.ObjectRef[pa.Table]] = images.to_arrow_refs()
        self._starts = np.cumsum([0, *(ray.get(block).num_rows for block in self._blocks)])

    def __call__(self, row_ids: Rows) -> dict[str, np.ndarray]:
        """Of rows int64[n], in any order: `image` uint8[n, 28, 28], `digit` int64[n], and `row_id`."""
        images = np.empty((len(row_ids), SIDE, SIDE), np.uint8)
        digits = np.empty(len(row_ids), np.int64)
        block_of = np.searchsorted(self._starts, row_ids, side="right") - 1
        for index in np.unique(block_of):
            table: pa.Table = ray.get(self._blocks[index])  # shared memory: nothing is copied
            here = np.flatnonzero(block_of == index)
            inside = row_ids[here] - self._starts[index]
            images[here] = images_of(table)[inside]
            digits[here] = digits_of(table)[inside]
        return {"image": images, "digit": digits, "row_id": row_ids}


def training_rows(task: dict[str, np.ndarray], gather: Gather, schedule: Schedule) -> dict[str, np.ndarray]:
    """What a worker needs for some steps: `image` uint8[n, 28, 28], `digit`, `row_id`, `number` int64[n], `draws` to distort."""
    epoch = int(task["epoch"][0])
    rows = schedule.rows(epoch, int(task["first"][0]), int(task["last"][0]))
    batch = gather(rows)
    if schedule.max_shift:
        batch["image"] = _shifted(batch["image"], shifts(schedule.seed, epoch, rows, schedule.max_shift), schedule.max_shift)
    batch["number"] = random_numbers(schedule.seed, epoch, rows)
    if schedule.distortion:  # carried out on the device
        batch["draws"] = distortions(schedule.seed, epoch, rows)
    return batch


def _shifted(images: Pixels, moves: Rows, limit: int) -> Pixels:
    """Move each image by its (down, right), int64[n, 2] in -limit..limit; background comes in at the edge."""
    padded = np.pad(images, ((0, 0), (limit, limit), (limit, limit)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    return windows[np.arange(len(images)), limit - moves[:, 0], limit - moves[:, 1]]
