"""Functions of Ray Data's tasks: read parts of the source, and take rows out of the blocks in the object store.

This module does not import torch: a task process that took a second to import it would delay the first training rows.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.data.parts import ParquetPart
from mnistsum_ray.data.pixels import IMAGE_TYPE, SIDE, Pixels, one_chunk, pixels_view
from mnistsum_ray.data.sampling import RowIds, distortions, random_numbers
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.schedule import Schedule


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


def images_of(table: pa.Table) -> Pixels:
    """The column `image` of n rows as uint8[n, 28, 28], without a copy where it is one chunk."""
    return pixels_view(one_chunk(table["image"]))


def digits_of(table: pa.Table) -> npt.NDArray[np.int8]:
    """The column `digit` as int8[n]."""
    return table["digit"].to_numpy()  # type: ignore[no-any-return]


class Gather:
    """Random access to rows of a dataset in the object store."""

    def __init__(self, images: MaterializedDataset) -> None:
        self._blocks: list[ray.ObjectRef[pa.Table]] = images.to_arrow_refs()
        self._starts = np.cumsum([0, *(ray.get(block).num_rows for block in self._blocks)])

    def __call__(self, row_ids: RowIds) -> dict[str, np.ndarray]:
        """Rows int64[n] in any order as `image` uint8[n, 28, 28], `digit` int64[n] and `row_id` int64[n]."""
        images = np.empty((len(row_ids), SIDE, SIDE), np.uint8)
        digits = np.empty(len(row_ids), np.int64)
        block_indices = np.searchsorted(self._starts, row_ids, side="right") - 1
        for index in np.unique(block_indices):
            table: pa.Table = ray.get(self._blocks[index])  # in shared memory, so nothing is copied
            places = np.flatnonzero(block_indices == index)
            rows = row_ids[places] - self._starts[index]
            images[places] = images_of(table)[rows]
            digits[places] = digits_of(table)[rows]
        return {"image": images, "digit": digits, "row_id": row_ids}


def training_rows(task: dict[str, np.ndarray], gather: Gather, schedule: Schedule) -> dict[str, np.ndarray]:
    """Rows of one gather task: `image`, `digit` and `row_id` of `Gather`, `number` int64[n] and, to distort, `draws`.

    A row's number and draws follow from (seed, epoch, row id), so a task that Ray runs again yields the same rows.
    """
    epoch = int(task["epoch"][0])
    rows = schedule.rows(epoch, int(task["first"][0]), int(task["last"][0]))
    batch = gather(rows)
    batch["number"] = random_numbers(schedule.seed, epoch, rows)
    if schedule.distortion:  # the worker distorts the images, on its device
        batch["draws"] = distortions(schedule.seed, epoch, rows)
    return batch
