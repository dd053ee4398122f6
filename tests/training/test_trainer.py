"""The steps of an epoch. What a row is given there: tests/integration/test_rows.py."""

import pytest

from mnistsum_ray.training.trainer import EpochSteps

SHARDS = [
    ((1000,), 64, 16, [64] * 15 + [40]),
    ((64, 64), 64, 2, [64, 64]),
    ((70, 32), 64, 3, [64, 32, 6]),  # in the last step the second rank has no rows
    ((100, 90, 101), 32, 10, [32] * 8 + [23, 12]),  # of 10, 11 and 11 rows
    ((3, 0, 5), 4, 3, [2 + 1, 2 + 1, 1 + 1]),
]


@pytest.mark.parametrize(("shards", "batch_size", "count", "batch_rows"), SHARDS)
def test_the_steps_of_an_epoch_take_every_row_of_unequal_shards(
    shards: tuple[int, ...], batch_size: int, count: int, batch_rows: list[int]
) -> None:
    steps = EpochSteps(shards, batch_size)
    assert sum(steps.share(rank) for rank in range(len(shards))) == batch_size
    assert steps.count == count
    assert [steps.batch_rows(step) for step in range(count)] == batch_rows
    assert sum(batch_rows) == sum(shards)
    assert steps.batch_rows(count) == 0
