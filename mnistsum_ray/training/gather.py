"""Which rows a worker sees at which step, and how they are taken out of the blocks: what Ray Data's tasks carry out.

No torch here: a process that takes a second to import it would have training wait for its first rows.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.data.decoding import IMAGE_TYPE, SIDE, Pixels, one_chunk, pixels_view
from mnistsum_ray.data.parquet_parts import ParquetPart
from mnistsum_ray.data.sampling import RowIds, distortions, random_numbers, shifts
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.schedule import Schedule


def read_part(batch: pa.Table, parts: tuple[ParquetPart, ...]) -> pa.Table:
    """Read the part whose index the batch names: `image`, `digit`, and `refusal`, null unless the part cannot be used."""
    part = parts[batch["part"][0].as_py()]
    # Ray Data wraps an exception and loses its type on the way to the driver, so what a user did wrong travels as a value.
    try:
        return part.read().append_column("refusal", pa.nulls(part.rows, pa.string()))
    except RequestError as refusal:
        return pa.table(
            {"image": pa.array([bytes(SIDE * SIDE)], IMAGE_TYPE), "digit": pa.array([0], pa.int8()), "refusal": [str(refusal)]}
        )


def images_of(table: pa.Table) -> Pixels:
    """The column `image` of n rows as uint8[n, 28, 28], without a copy where it lies in one piece."""
    return pixels_view(one_chunk(table["image"]))


def digits_of(table: pa.Table) -> npt.NDArray[np.int8]:
    """The column `digit` as int8[n]."""
    return table["digit"].to_numpy()  # type: ignore[no-any-return]


class Gather:
    """Takes rows out of the blocks, wherever in the object store they lie."""

    def __init__(self, images: MaterializedDataset) -> None:
        self._blocks: list[ray.ObjectRef[pa.Table]] = images.to_arrow_refs()
        self._starts = np.cumsum([0, *(ray.get(block).num_rows for block in self._blocks)])

    def __call__(self, row_ids: RowIds) -> dict[str, np.ndarray]:
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
        batch["image"] = _shift(batch["image"], shifts(schedule.seed, epoch, rows, schedule.max_shift), schedule.max_shift)
    batch["number"] = random_numbers(schedule.seed, epoch, rows)
    if schedule.distortion:  # carried out on the device
        batch["draws"] = distortions(schedule.seed, epoch, rows)
    return batch


def _shift(images: Pixels, moves: RowIds, limit: int) -> Pixels:
    """Move each image by its (down, right), int64[n, 2] in -limit..limit; background comes in at the edge."""
    padded = np.pad(images, ((0, 0), (limit, limit), (limit, limit)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    return windows[np.arange(len(images)), limit - moves[:, 0], limit - moves[:, 1]]
