"""Rows for a training worker: its share of each step, and held-out rows; from the object store or streamed from Parquet.

    rows in memory   source ──read, decode──▶ object store ──gather──▶ rank 0: step 0, step 1, … of every epoch
                                              (in_memory.py)   └─────▶ rank 1: …
    streamed rows    Parquet ──read, decode, permute a window──▶ rank 0 puts its lanes together
                             (streaming.py)                 └──▶ rank 1 …

Each worker has its own executions of Ray Data, which go over the ends of the epochs. The order of every epoch is known
beforehand, so the first batches of the next epoch are ready before this one ends, and which rows a worker gets depends on nothing
that a scheduler decides. Ray's `streaming_split` would drop up to one row a worker, and a new execution for each epoch would cost
its start-up each time.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds, mix_ids
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.training.schedule import Chunk, Schedule

Batch = dict[str, torch.Tensor]
"""image uint8[n, 28, 28], digit int64[n], row_id int64[n]; in training also number int64[n], mixed_id int64[n]
(`sampling.mix_ids`) and, with --distortion, affine float32[n, AFFINE_VALUES]; all on the worker's device."""

_EVALUATION_BATCH: Final = 250
_GPU_EVALUATION_BATCH: Final = 2_000

_RESIDENT_ROWS: Final = 100_000
"""Held-out rows of all workers that stay on their devices, 0.8 KB each. More are read anew each time."""


class Rows(Protocol):
    """Access to rows of the source."""

    def lanes(self, rows: RowRanges, batch_size: int) -> int:
        """Number of lanes of a batch of training rows, see `Schedule.lanes`."""
        ...

    def training_batches(self, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
        """This worker's share of each step of all remaining epochs, in order."""
        ...

    def in_order(self, rows: RowRanges, batch_rows: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """This worker's share of some rows, in batches: `image` uint8[n, 28, 28], `digit` int64[n] and `row_id` int64[n]."""
        ...

    def sample(self, rows: RowRanges, limit: int) -> RowRanges:
        """At most `limit` of the rows, evenly spaced: the first rows of a sorted source would all show one digit."""
        ...


@dataclass(frozen=True)
class TrainingRows:
    """How a worker gets at the rows of the splits."""

    train: Rows
    held_out: Rows


def load_rows(source: Rows, ids: RowIds) -> dict[str, np.ndarray]:
    """A few rows int64[n], distinct and in any order, as one batch in this order."""
    order = np.argsort(ids)
    batches = list(source.in_order(RowRanges.from_ids(ids[order]), _EVALUATION_BATCH))
    if not batches:
        return {"image": np.empty((0, 28, 28), np.uint8), "digit": np.empty(0, np.int64), "row_id": np.empty(0, np.int64)}
    back = np.argsort(order)
    return {name: np.concatenate([batch[name] for batch in batches])[back] for name in batches[0]}


class EvaluationSet:
    """Held-out rows, undistorted and without numbers, and this worker's share of them as batches on its device."""

    def __init__(self, source: Rows, rows: RowRanges, rank: int, world_size: int, device: torch.device) -> None:
        self.rows = rows
        self._source, self._rank, self._world_size, self._device = source, rank, world_size, device
        self._resident = list(self._read()) if len(rows) <= _RESIDENT_ROWS else None

    @property
    def batches(self) -> Iterable[Batch]:
        """Batches of the share; each row is in the share of one worker."""
        return self._read() if self._resident is None else self._resident

    def _read(self) -> Iterator[Batch]:
        size = _GPU_EVALUATION_BATCH if self._device.type == "cuda" else _EVALUATION_BATCH
        return to_device(self._source.in_order(self.rows, size, self._rank, self._world_size), self._device)


def split_into_steps(batch: Batch, schedule: Schedule, chunk: Chunk) -> Iterator[Batch]:
    """The rows of a chunk as this worker's share of each of its steps."""
    batch = batch | {"mixed_id": mix_ids(batch["row_id"])}
    start = 0
    for step in chunk.steps:
        end = start + schedule.share_rows(step)
        yield {name: values[start:end] for name, values in batch.items()}
        start = end


def to_device(batches: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[Batch]:
    """Batches of arrays as tensors on a device; for a GPU each is put into pinned memory while the one before it is used."""
    tensors = ({name: array_to_device(values, device) for name, values in batch.items()} for batch in batches)
    if device.type != "cuda":
        yield from tensors
        return
    with ThreadPoolExecutor(1) as copier:
        upcoming = copier.submit(next, tensors, None)
        while (batch := upcoming.result()) is not None:
            upcoming = copier.submit(next, tensors, None)
            yield batch
