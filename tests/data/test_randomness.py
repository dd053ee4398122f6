"""What is random about a row is a function of seed, epoch and row id, and its values are pinned."""

import numpy as np
import pytest

from mnistsum_ray.data.decoding import content_ids, positions
from mnistsum_ray.data.randomness import Purpose, RowRandom, seeds

IDS = np.random.default_rng(0).integers(-(2**63), 2**63, 100_000)


def test_pinned_values() -> None:
    """A change of these numbers is a change of every run's result."""
    draws = RowRandom(0, 0, np.arange(12))
    assert draws.whole(1, 10).tolist() == [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
    assert draws.whole("noise", 10).tolist()[:6] == [8, 9, 3, 4, 0, 6]
    uniform = [0.4907679, 0.266621, 0.810253, 0.2396286, 0.4294631, 0.6650428]
    assert draws.uniform(4, 6)[0].tolist() == pytest.approx(uniform, abs=1e-6)
    assert RowRandom(7, 3, np.array([0, 59_999, 2**40])).whole(1, 10).tolist() == [2, 4, 0]
    first, second = seeds(0, 0, Purpose.STEP, range(2))
    assert first == 5784922337503569493
    assert [second] == seeds(0, 0, Purpose.STEP, range(1, 2))
    assert seeds(0, 0, Purpose.ROW_ORDER, range(2))[0] not in (first, second)
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    assert content_ids({"image": images, "digit": np.arange(2)}).tolist() == [
        -2485049538753768026,
        1259559332331380196,
    ]
    photos = {"photo": np.array([b"", b"ab"], object)}
    assert content_ids(photos).tolist() == [1786884285633530058, -4887375840846233476]


def chi_squared(one: np.ndarray, other: np.ndarray) -> float:
    """Of the pairs of two draws of 0..9."""
    pairs, expected = np.bincount(one * 10 + other, minlength=100), len(one) / 100
    return float(((pairs - expected) ** 2).sum() / expected)


def test_draws_are_uniform_and_those_of_another_seed_epoch_or_purpose_are_others() -> None:
    first = RowRandom(0, 0, IDS).whole(1, 10)
    for draws, purpose in (
        (RowRandom(0, 1, IDS), 1),
        (RowRandom(1, 0, IDS), 1),
        (RowRandom(0, 0, IDS), "number"),
        (RowRandom(0, 0, IDS), "numbers"),
    ):
        assert chi_squared(first, draws.whole(purpose, 10)) < 150, "one in 1000"
    uniform = RowRandom(0, 0, IDS).uniform("place", 2)
    assert (uniform.dtype.name, uniform.shape) == ("float32", (len(IDS), 2))
    assert ((uniform >= 0) & (uniform < 1)).all()
    tenths = (10 * uniform).astype(int).T
    assert chi_squared(*tenths) < 150
    some = IDS[::7]
    assert np.array_equal(RowRandom(0, 0, some).uniform("place", 2), uniform[::7]), (
        "of each row alone"
    )


def test_ids_follow_from_the_values_of_all_columns_and_lie_anywhere() -> None:
    images, labels = np.arange(20_000).reshape(10_000, 2), np.zeros(10_000, np.int64)
    ids = content_ids({"image": images, "label": labels})
    assert len(set(ids)) == 10_000
    assert np.array_equal(content_ids({"image": images[::-2], "label": labels[::-2]}), ids[::-2])
    assert not set(content_ids({"image": images, "label": labels + 1})) & set(ids)
    joined = content_ids(
        {"a": np.array([b"a", b"ab"], object), "b": np.array([b"bc", b"c"], object)}
    )
    assert joined[0] != joined[1]
    assert content_ids({"image": images[:0]}).shape == (0,)
    tenths = np.bincount((10 * positions(ids)).astype(int), minlength=10)
    assert 900 < tenths.min() <= tenths.max() < 1100
    assert (positions(np.array([0, -1])) < 1).all()
