"""A worker's part in an epoch: its share of each batch, and what a row is given."""

from typing import Any

import numpy as np
import pytest
import torch

from mnistsum_ray.data.randomness import distortions, random_numbers
from mnistsum_ray.training.trainer import EpochSteps, PairWithNumbers

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


def test_a_row_is_paired_by_seed_epoch_and_its_id_whatever_rows_are_beside_it() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 500)  # as of `row_hash`
    images = np.zeros((500, 28, 28), np.uint8)
    rows: dict[str, Any] = {"image": images, "digit": ids % 10, "row_id": ids}
    batch = PairWithNumbers(3, 7, 1.0)(rows)
    assert batch["row_id"].tolist() == ids.tolist()
    assert batch["number"].tolist() == random_numbers(3, 7, ids).tolist()
    assert np.array_equal(batch["affine"], distortions(3, 7, ids, 1.0))
    for name in ("digit", "number", "row_id"):
        assert batch[name].dtype == torch.int64
    some = PairWithNumbers(3, 7, 0.0)({name: values[99:999:9] for name, values in rows.items()})
    assert "affine" not in some
    assert some["number"].tolist() == batch["number"][99:999:9].tolist()
    other = PairWithNumbers(3, 8, 0.0)(rows)
    assert other["number"].tolist() != batch["number"].tolist()
