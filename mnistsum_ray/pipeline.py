"""The Ray Data side of training: read and decode once, then stream shuffled pairs to each worker.

    source ──read, decode──▶ blocks in the object store ──gather──▶ rank 0: step 0, step 1, … of every epoch
                             (uint8, in row id order)      └──────▶ rank 1: …

One execution per worker streams all the epochs that are left: the order of every epoch is known beforehand
(pairs.py), so the next epoch's first batches are ready before this one ends, and a worker's rows depend on
(seed, epoch, rank, world size) and on nothing that a scheduler decides. `streaming_split` would drop up to a
row a worker, and a new execution each epoch costs its start-up each epoch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import TaskPoolStrategy
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.config import Refusal
from mnistsum_ray.metrics import RowsLost
from mnistsum_ray.mnist import ParquetPart, Source
from mnistsum_ray.pairs import Rows, epoch_order, random_numbers, rank_share, shifts, steps_per_epoch
from mnistsum_ray.report import quiet_ray_data
from mnistsum_ray.schema import IMAGE_TYPE, SIDE, Pixels, pixels_view

Batch = dict[str, torch.Tensor]
"""image uint8[n, 28, 28], digit int64[n], row_id int64[n], and in training number int64[n]; on the worker's device."""

_NO_CPUS: Final = 0
"""What the tasks here reserve: they do little, and one that had to wait for a CPU that the workers hold would wait for ever,
as when a node is lost and the others are full."""

EVALUATION_ROWS: Final = 250
"""Rows in one forward pass of an evaluation."""

_TASK_ROWS: Final = 4096
"""Rows that one gather task yields: 3 MB, some tens of milliseconds."""


def quiet() -> None:
    """Keep the order of rows, and leave it to the app to say what is going on."""
    quiet_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True


@dataclass(frozen=True)
class Loaded:
    """A source in the object store."""

    images: MaterializedDataset
    """Columns `image` (784 bytes) and `digit` int8, in row id order."""
    fingerprint: str
    """SHA-256 over all pixels and digits in row id order, and over which rows are train, validation and test."""
    root: ray.data.Dataset | None
    """What `images` was read from: while it is held, Ray can read again what is lost with a node."""


def load(source: Source) -> Loaded:
    """Read and decode every row on the cluster.

    Raises:
        Refusal: a row or a file is not what its footer promised.
    """
    root = None
    if all(isinstance(part, pa.Table) for part in source.parts):
        images = ray.data.from_arrow(list(source.parts)).materialize()
    else:
        # By number: a column of Python objects needs an Arrow type that scoring, in the same process, does without.
        root = ray.data.from_items([{"part": index} for index in range(len(source.parts))], override_num_blocks=len(source.parts))
        at_once = TaskPoolStrategy(size=min(len(source.parts), max(1, int(ray.cluster_resources().get("CPU", 1)))))
        images = root.map_batches(
            _read, fn_args=(source.parts,), batch_format="pyarrow", batch_size=1, num_cpus=_NO_CPUS, compute=at_once
        ).materialize()
    digest, rows = hashlib.sha256(), 0
    for block in images.to_arrow_refs():
        table: pa.Table = ray.get(block)
        if "refusal" in table.column_names and table["refusal"].null_count < table.num_rows:
            raise Refusal(table["refusal"].drop_null()[0].as_py())
        rows += table.num_rows
        digest.update(np.ascontiguousarray(_images(table)).data)
        digest.update(np.ascontiguousarray(_digits(table)).data)
    if rows != source.rows:
        raise RowsLost(f"read {rows:,} rows of {source.location}, whose files hold {source.rows:,}")
    for split in (source.train, source.validation, source.test):
        digest.update(f"{len(split)} rows".encode() + np.ascontiguousarray(split, np.int64).tobytes())
    return Loaded(images, digest.hexdigest(), root)


def _read(batch: pa.Table, parts: tuple[ParquetPart, ...]) -> pa.Table:
    part = parts[batch["part"][0].as_py()]
    # Ray Data wraps an exception and loses its type on the way to the driver, so what a user did wrong travels as a value.
    try:
        return part.read().append_column("refusal", pa.nulls(part.rows, pa.string()))
    except Refusal as refusal:
        return pa.table(
            {"image": pa.array([bytes(SIDE * SIDE)], IMAGE_TYPE), "digit": pa.array([0], pa.int8()), "refusal": [str(refusal)]}
        )


def _images(table: pa.Table) -> Pixels:
    (chunk,) = table["image"].combine_chunks().chunks if table["image"].num_chunks > 1 else table["image"].chunks
    return pixels_view(chunk)


def _digits(table: pa.Table) -> npt.NDArray[np.int8]:
    return table["digit"].to_numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Schedule:
    """What one worker is to see, and in which order: pure arithmetic, the same wherever it is worked out."""

    row_ids: Rows
    """The training rows, ascending."""
    batch_size: int
    seed: int
    max_shift: int
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


class _Gather:
    """Takes rows out of the blocks, wherever in the object store they lie."""

    def __init__(self, images: MaterializedDataset) -> None:
        self._blocks: list[ray.ObjectRef[pa.Table]] = images.to_arrow_refs()
        self._starts = np.cumsum([0, *(ray.get(block).num_rows for block in self._blocks)])

    def __call__(self, row_ids: Rows) -> dict[str, np.ndarray]:
        images = np.empty((len(row_ids), SIDE, SIDE), np.uint8)
        digits = np.empty(len(row_ids), np.int64)
        block_of = np.searchsorted(self._starts, row_ids, side="right") - 1
        for index in np.unique(block_of):
            table: pa.Table = ray.get(self._blocks[index])  # shared memory: nothing is copied
            here = np.flatnonzero(block_of == index)
            inside = row_ids[here] - self._starts[index]
            images[here] = _images(table)[inside]
            digits[here] = _digits(table)[inside]
        return {"image": images, "digit": digits, "row_id": row_ids}


def _training_rows(task: dict[str, np.ndarray], gather: _Gather, schedule: Schedule) -> dict[str, np.ndarray]:
    epoch = int(task["epoch"][0])
    rows = schedule.rows(epoch, int(task["first"][0]), int(task["last"][0]))
    batch = gather(rows)
    if schedule.max_shift:
        batch["image"] = _shifted(batch["image"], shifts(schedule.seed, epoch, rows, schedule.max_shift), schedule.max_shift)
    return batch | {"number": random_numbers(schedule.seed, epoch, rows)}


def _shifted(images: Pixels, moves: Rows, limit: int) -> Pixels:
    """Move each image by its (down, right), int64[n, 2] in -limit..limit; background comes in at the edge."""
    padded = np.pad(images, ((0, 0), (limit, limit), (limit, limit)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    return windows[np.arange(len(images)), limit - moves[:, 0], limit - moves[:, 1]]


def training_batches(images: MaterializedDataset, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
    """This worker's share of every step of every epoch that is left, in order, as uint8 on the device."""
    tasks = schedule.tasks()
    busy = [task for task in tasks if schedule.task_rows(task)]
    blocks: Iterator[Batch] = iter(())
    if busy:
        stream = ray.data.from_items(busy, override_num_blocks=len(busy)).map_batches(
            _training_rows,
            fn_kwargs={"gather": _Gather(images), "schedule": schedule},
            batch_size=1,
            num_cpus=_NO_CPUS,
            # Bounded, or Ray starts a process for every waiting task. One gathers some 200,000 rows/s, in 20 ms each.
            compute=TaskPoolStrategy(size=2 if device.type == "cuda" else 1),
        )
        blocks = iter(stream.iter_torch_batches(batch_size=None, prefetch_batches=2, device=device))
    nothing = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in ("digit", "row_id", "number")}
    nothing["image"] = torch.zeros((0, SIDE, SIDE), dtype=torch.uint8, device=device)
    for task in tasks:
        rows = schedule.task_rows(task)
        block = next(blocks) if rows else nothing  # Ray Data hands on no empty block
        if len(block["row_id"]) != rows:
            raise RowsLost(f"a block of epoch {task['epoch'] + 1} has {len(block['row_id'])} rows, the schedule has {rows}")
        start = 0
        for step in range(task["first"], task["last"]):
            end = start + schedule.share_rows(step)
            yield {name: values[start:end] for name, values in block.items()}
            start = end


def held_out_batches(images: MaterializedDataset, row_ids: Rows, rank: int, world_size: int, device: torch.device) -> list[Batch]:
    """This worker's share of held-out rows, as uint8 batches that stay on the device: 0.8 KB a row."""
    gather, share = _Gather(images), rank_share(row_ids, rank, world_size)
    return [
        {name: torch.as_tensor(values, device=device) for name, values in gather(share[start : start + EVALUATION_ROWS]).items()}
        for start in range(0, len(share), EVALUATION_ROWS)
    ]
