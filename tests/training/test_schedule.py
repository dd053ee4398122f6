"""Schedule: each row once an epoch, for any number of workers."""

import numpy as np
import pytest

from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import epoch_order
from mnistsum_ray.training.schedule import Schedule

IDS = np.arange(10, 1015)  # 1,005 rows: not a multiple of anything below


def schedule(rank: int, world_size: int, batch_size: int = 64, lanes: int | None = None) -> Schedule:
    return Schedule(
        rows=RowRanges.from_ids(IDS),
        batch_size=batch_size,
        lanes=lanes or batch_size,
        seed=5,
        distortion=0.0,
        epochs=3,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [8, 64, 256])
def test_every_row_once_an_epoch_over_all_workers(world_size: int, batch_size: int) -> None:
    workers = [schedule(rank, world_size, batch_size) for rank in range(world_size)]
    for epoch in range(3):
        seen = []
        for worker in workers:
            chunks = [chunk for chunk in worker.chunks() if chunk.epoch == epoch]
            assert chunks[0].first == 0
            assert chunks[-1].last == worker.steps
            rows = np.concatenate([worker.permuted_ids(chunk) for chunk in chunks])
            assert len(rows) == sum(worker.share_rows(step) for step in range(worker.steps))
            seen.append(rows)
        assert sorted(np.concatenate(seen)) == IDS.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_sees_the_same_rows_for_any_number_of_workers(world_size: int) -> None:
    order = epoch_order(5, 1, IDS)
    step = 15
    shares = []
    for rank in range(world_size):
        worker = schedule(rank, world_size)
        (chunk,) = [chunk for chunk in worker.chunks() if chunk.epoch == 1]
        rows = worker.permuted_ids(chunk)
        start = sum(worker.share_rows(earlier) for earlier in range(step))
        shares.append(rows[start : start + worker.share_rows(step)])
    batch = order[step * 64 : (step + 1) * 64]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    assert all(np.array_equal(share, batch[rank::world_size]) for rank, share in enumerate(shares))


@pytest.mark.parametrize("lanes", [1, 8, 16, 48, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16, 20, 70])
def test_each_position_of_a_batch_belongs_to_one_worker(lanes: int, world_size: int) -> None:
    workers = [schedule(rank, world_size, lanes=lanes) for rank in range(world_size)]
    for step in (0, workers[0].steps - 1):
        positions = np.concatenate([worker.positions(step) for worker in workers])
        assert sorted(positions) == list(range(workers[0].batch_rows(step)))
    for worker in workers:
        assert {int(position) % lanes for position in worker.positions(0)} <= set(worker.my_lanes)


def test_a_resumed_schedule_is_the_rest_of_the_whole() -> None:
    whole = list(schedule(0, 1).chunks())
    rest = list(Schedule(**(schedule(0, 1).__dict__ | {"first_epoch": 2})).chunks())
    assert rest == [chunk for chunk in whole if chunk.epoch == 2]
