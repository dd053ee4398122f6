"""The worker's side of streaming: rows of its lanes, as they are read, become its shares of the steps."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from mnistsum_ray.data.distortion import AFFINE_VALUES
from mnistsum_ray.data.pixels import SIDE
from mnistsum_ray.training.schedule import Chunk, Schedule


class LaneQueues:
    """Rows of each lane that have been read and not been taken."""

    def __init__(self, blocks: Iterator[tuple[int, dict[str, np.ndarray]]]) -> None:
        self._blocks = blocks
        self._waiting: dict[int, deque[dict[str, np.ndarray]]] = {}

    def take(self, lane: int, rows: int) -> Iterable[dict[str, np.ndarray]]:
        """The next rows of a lane, in several pieces."""
        waiting = self._waiting.setdefault(lane, deque())
        while rows:
            while not waiting:
                read_lane, block = next(self._blocks)
                self._waiting.setdefault(read_lane, deque()).append(block)
            block = waiting.popleft()
            size = len(block["row_id"])
            if size > rows:
                waiting.appendleft({name: values[rows:] for name, values in block.items()})
                block = {name: values[:rows] for name, values in block.items()}
            rows -= min(rows, size)
            yield block


class Interleaver:
    """Puts the rows of a worker's lanes together to its shares of the steps."""

    def __init__(self, schedule: Schedule, queues: LaneQueues) -> None:
        self._schedule, self._queues = schedule, queues
        self._full_shares = {lane: self._places(schedule.positions(0), lane) for lane in schedule.my_lanes}

    def _places(self, positions: npt.NDArray[np.int64], lane: int) -> npt.NDArray[np.int64]:
        """Indices, in a share with these positions, of the rows that come from a lane."""
        return np.flatnonzero(positions % self._schedule.lanes == lane)

    def next_chunk(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The rows of a chunk, in the order of the steps and of the positions in the batch."""
        schedule, rows = self._schedule, self._schedule.chunk_rows(chunk)
        batch: dict[str, np.ndarray] = {"image": np.empty((rows, SIDE, SIDE), np.uint8)}
        batch |= {name: np.empty(rows, np.int64) for name in ("digit", "row_id", "number")}
        if schedule.distortion:
            batch["affine"] = np.empty((rows, AFFINE_VALUES), np.float32)
        for lane in schedule.my_lanes:
            places, start = self._places_in_chunk(chunk, lane), 0
            for piece in self._queues.take(lane, len(places)):
                there = places[start : start + len(piece["row_id"])]
                for name, values in batch.items():
                    values[there] = piece[name]
                start += len(there)
        return batch

    def _places_in_chunk(self, chunk: Chunk, lane: int) -> npt.NDArray[np.int64]:
        """Indices, in the rows of a chunk, of the rows that come from a lane: int64[n]."""
        last = chunk.last - 1
        starts = np.arange(len(chunk.steps)) * self._schedule.share_rows(chunk.first)
        full = (starts[:-1, None] + self._full_shares[lane]).ravel()
        return np.concatenate([full, starts[-1] + self._places(self._schedule.positions(last), lane)])
