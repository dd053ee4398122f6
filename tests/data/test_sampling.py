"""The draws are pure, uniform and pinned: a change of these numbers is a change of every run's result."""

import numpy as np
import pytest

from mnistsum_ray.data.sampling import (
    DISTORTION_DRAWS,
    RandomStream,
    distortion_draws,
    epoch_order,
    held_out,
    random_numbers,
    shard_for_rank,
    step_seed,
    steps_per_epoch,
)

ROWS = np.arange(60_000)


def test_pinned_values() -> None:
    assert random_numbers(0, 0, np.arange(12)).tolist() == PINNED_NUMBERS
    assert random_numbers(7, 3, np.array([0, 59_999, 2**40])).tolist() == PINNED_LATER
    assert epoch_order(0, 0, np.arange(10)).tolist() == PINNED_ORDER
    assert held_out(np.arange(20), 4)[1].tolist() == PINNED_HELD_OUT
    assert distortion_draws(0, 0, np.arange(2))[:, :3].ravel().tolist() == pytest.approx(PINNED_DISTORTIONS, abs=1e-6)


def test_distortions_are_uniform_and_say_nothing_of_each_other() -> None:
    draws = distortion_draws(1, 2, ROWS)
    assert draws.shape == (60_000, DISTORTION_DRAWS)
    assert draws.dtype == np.float32
    assert draws.min() >= -1
    assert draws.max() < 1
    for column in range(DISTORTION_DRAWS):
        assert chi_square(((draws[:, column] + 1) * 5).astype(np.int64), 10) < 27.9
    related = np.corrcoef(draws, rowvar=False) - np.eye(DISTORTION_DRAWS)
    assert np.abs(related).max() < 0.02
    assert np.array_equal(distortion_draws(1, 2, ROWS[[5, 44_444]]), draws[[5, 44_444]])


def test_every_step_has_seeds_of_its_own() -> None:
    purposes = (RandomStream.DROPOUT, RandomStream.SUM_HEAD)
    steps = [(seed, epoch, step) for seed in range(3) for epoch in range(4) for step in range(300)]
    seeds = {step_seed(*step, purpose) for step in steps for purpose in purposes}
    assert len(seeds) == 2 * len(steps)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0, 0, RandomStream.DROPOUT) == PINNED_DROPOUT


def chi_square(draws: np.ndarray, values: int) -> float:
    expected = len(draws) / values
    return float((((np.bincount(draws, minlength=values) - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_numbers_are_uniform(seed: int) -> None:
    # 27.9 is the 0.1 % point of chi-square with 9 degrees of freedom; the draws are pinned, so this cannot flicker.
    assert chi_square(random_numbers(seed, 0, ROWS), 10) < 27.9


def test_numbers_are_uniform_over_epochs_for_one_row() -> None:
    draws = np.array([random_numbers(0, epoch, np.array([17]))[0] for epoch in range(5000)])
    assert chi_square(draws, 10) < 27.9


def test_numbers_say_nothing_of_the_order_or_of_the_epoch_before() -> None:
    first, second = random_numbers(0, 0, ROWS), random_numbers(0, 1, ROWS)
    assert abs(np.mean(first == second) - 0.1) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    in_order = random_numbers(0, 0, epoch_order(0, 0, ROWS))
    assert abs(np.corrcoef(in_order, np.arange(len(in_order)))[0, 1]) < 0.02


def test_a_row_has_its_number_whatever_rows_are_beside_it() -> None:
    whole = random_numbers(3, 2, ROWS)
    some = np.array([5, 44_444, 9])
    assert random_numbers(3, 2, some).tolist() == whole[some].tolist()


def test_each_epoch_is_another_permutation() -> None:
    orders = [epoch_order(0, epoch, ROWS) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), ROWS)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert not np.array_equal(orders[0], epoch_order(1, 0, ROWS))


def test_held_out_rows_are_disjoint_and_fixed() -> None:
    kept, out = held_out(ROWS, 5000)
    assert len(out) == 5000
    assert np.array_equal(np.sort(np.concatenate([kept, out])), ROWS)
    assert np.array_equal(out, held_out(ROWS, 5000)[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_put_together_are_the_batch(world_size: int) -> None:
    batch = np.arange(250)
    shares = [shard_for_rank(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares)) == batch.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_last_batch_is_not_dropped() -> None:
    assert steps_per_epoch(55_000, 256) == 215
    assert steps_per_epoch(256, 256) == 1
    assert steps_per_epoch(257, 256) == 2


PINNED_NUMBERS = [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
PINNED_LATER = [2, 4, 0]
PINNED_ORDER = [2, 0, 4, 9, 3, 8, 1, 7, 5, 6]
PINNED_HELD_OUT = [0, 5, 8, 16]
PINNED_DISTORTIONS = [-0.0184642, -0.466758, 0.6205059, 0.772669, 0.4082098, -0.7092839]
PINNED_DROPOUT = 5784922337503569493
