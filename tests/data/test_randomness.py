"""What is random about a row is a function of seed, epoch and row id, and its values are pinned."""

import numpy as np
import pytest
import torch

from mnistsum_ray.data.randomness import (
    Purpose,
    distortions,
    mix_ids,
    random_numbers,
    split_keys,
    step_seed,
)

IDS = np.random.default_rng(0).integers(-(2**63), 2**63, 100_000)


def test_pinned_values() -> None:
    """A change of these numbers is a change of every run's result."""
    assert random_numbers(0, 0, np.arange(12)).tolist() == [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
    assert random_numbers(7, 3, np.array([0, 59_999, 2**40])).tolist() == [2, 4, 0]
    pinned = [0.9543918, -0.0486454, -0.0302301, -0.0030756, 1.0640106, 0.0707326]
    matrices = distortions(0, 0, np.arange(2), strength=1.0)
    assert matrices[0].tolist() == pytest.approx(pinned, abs=1e-6)
    assert step_seed(0, 0, 0, Purpose.DROPOUT) == 5784922337503569493
    assert step_seed(0, 0, 0, Purpose.ROW_ORDER) != step_seed(0, 0, 1, Purpose.ROW_ORDER)
    assert np.argsort(split_keys(np.arange(20)))[:4].tolist() == [8, 0, 16, 5]


def test_draws_are_uniform_and_those_of_another_seed_or_epoch_are_others() -> None:
    first = random_numbers(0, 0, IDS)
    for other in (random_numbers(0, 1, IDS), random_numbers(1, 0, IDS)):
        pairs = np.bincount(first * 10 + other, minlength=100)
        expected = len(IDS) / 100
        assert ((pairs - expected) ** 2).sum() / expected < 150  # chi-squared: one in 1000


def test_scrambled_ids_are_the_same_in_numpy_and_pytorch_and_tell_sets_apart() -> None:
    assert mix_ids(IDS).tolist() == mix_ids(torch.from_numpy(IDS)).tolist()
    assert mix_ids(np.array([3, 5])).sum() != mix_ids(np.array([4, 4])).sum()
