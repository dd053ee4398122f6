"""Schedule: each row once an epoch, for any number of workers."""

import numpy as np
import pytest

from mnistsum_ray.data.sampling import epoch_order
from mnistsum_ray.training.finalize import evenly_spaced
from mnistsum_ray.training.schedule import Schedule

IDS = np.arange(10, 1015)  # 1,005 rows: not a multiple of anything below


def schedule(rank: int, world_size: int, batch_size: int = 64) -> Schedule:
    return Schedule(
        row_ids=IDS,
        batch_size=batch_size,
        seed=5,
        distortion=0.0,
        first_epoch=0,
        first_step=0,
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
            tasks = [task for task in worker.tasks() if task["epoch"] == epoch]
            assert tasks[0]["first"] == 0
            assert tasks[-1]["last"] == worker.steps
            rows = np.concatenate([worker.rows(epoch, task["first"], task["last"]) for task in tasks])
            assert len(rows) == sum(worker.share_rows(step) for step in range(worker.steps))
            seen.append(rows)
        assert sorted(np.concatenate(seen)) == IDS.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_sees_the_same_rows_for_any_number_of_workers(world_size: int) -> None:
    order = epoch_order(5, 1, IDS)
    for step in (0, 7, 15):
        together = np.concatenate([schedule(rank, world_size).rows(1, step, step + 1) for rank in range(world_size)])
        assert sorted(together) == sorted(order[step * 64 : (step + 1) * 64])


def test_a_resumed_schedule_is_the_rest_of_the_whole() -> None:
    whole = schedule(0, 1).tasks()
    rest = Schedule(**(schedule(0, 1).__dict__ | {"first_epoch": 2})).tasks()
    assert rest == [task for task in whole if task["epoch"] == 2]


def test_rows_for_calibration_are_evenly_spaced() -> None:
    assert evenly_spaced(IDS, 2000).tolist() == IDS.tolist()
    some = evenly_spaced(IDS, 400)
    assert len(set(some)) == 400
    assert (some[0], some[-1]) == (IDS[0], IDS[-1])
    assert np.diff(some).max() <= 3, "of a source sorted by digit, all digits"
