"""The order of training rows and their draws: each row once an epoch, the same for any number of workers, and pinned."""

import numpy as np
import pytest

from mnistsum_ray.data.order import (
    DISTORTION_DRAWS,
    RandomStream,
    RowRanges,
    Shuffle,
    distortion_draws,
    mix_ids,
    positions_of_rank,
    random_numbers,
    step_seed,
)

RANDOM = np.random.default_rng(0)

GROUPS = {
    "uneven": np.random.default_rng(1).integers(1, 400, 15).tolist(),
    "tiny": [1] * 900,
    "one large": [10, 2900, 10],
    "in memory": None,
}


def shuffle_of(groups: str, batch_size: int = 48, shuffle_rows: int = 2000, seed: int = 0) -> Shuffle:
    """The shuffle of all rows but a tenth, which are held out here and there."""
    sizes = GROUPS[groups]
    bounds = None if sizes is None else np.cumsum([0, *sizes])
    ids = np.arange(3000 if bounds is None else bounds[-1])
    return Shuffle(RowRanges.from_ids(ids[ids % 10 != 3]), bounds, batch_size, shuffle_rows, seed)


def batches(shuffle: Shuffle, workers: int = 1, epoch: int = 0) -> list[list[int]]:
    """The global batch of each step, from the positions of all workers in their order."""
    steps: list[list[int]] = [[] for _ in range(shuffle.steps)]
    for rank in range(workers):
        positions = positions_of_rank(shuffle.batch_size, rank, workers)
        counts = [shuffle.count(range(step, step + 1), positions) for step in range(shuffle.steps)]
        rows = np.split(shuffle.ids(epoch, range(shuffle.steps), positions), np.cumsum(counts)[:-1])
        assert [*map(len, rows)] == counts, "there are the rows of the steps and no others"
        for batch, of_rank in zip(steps, rows, strict=True):
            batch += of_rank.tolist()
    return steps


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("batch_size", "shuffle_rows"), [(7, 20), (48, 500), (256, 10**6)])
def test_every_row_once_an_epoch_and_the_same_batches_for_any_number_of_workers(
    groups: str, batch_size: int, shuffle_rows: int
) -> None:
    shuffle = shuffle_of(groups, batch_size, shuffle_rows)
    alone = batches(shuffle)
    assert [len(batch) for batch in alone] == [shuffle.batch_rows(step) for step in range(shuffle.steps)]
    assert sorted(row for batch in alone for row in batch) == shuffle.rows.ids().tolist()
    for workers in (2, 5):
        assert batches(shuffle, workers) == alone
    assert batches(shuffle, epoch=1) != alone
    assert batches(shuffle_of(groups, batch_size, shuffle_rows, seed=1)) != alone


@pytest.mark.parametrize("ids", [np.sort(RANDOM.choice(5000, 1500, replace=False)), np.array([7])], ids=["many", "one"])
def test_row_ranges_answer_as_a_set_does(ids: np.ndarray) -> None:
    ranges = RowRanges.from_ids(ids)
    assert len(ranges) == len(ids)
    assert np.array_equal(ranges.ids(), ids)
    assert (ranges.id_sum - int(mix_ids(ids).sum())) % 2**64 == 0
    bounds = np.array([0, 1, 7, 8, 2500, 4999, 5000, 9000])
    assert ranges.count_below(bounds).tolist() == [int((ids < bound).sum()) for bound in bounds]
    some = np.sort(RANDOM.choice(len(ids), min(len(ids), 50), replace=False))
    assert np.array_equal(ranges.at(some), ids[some])
    assert np.array_equal(ranges.minus(RowRanges.from_ids(ids[some])).ids(), np.setdiff1d(ids, ids[some]))
    assert RowRanges.of([0, 5, 5, 9], [5, 5, 7, 9]).ends.tolist() == [7], "those that touch are one, and empty ones none"


@pytest.mark.parametrize("groups", [[100] * 2000, [3, 5, 10**5, 7, 10**5], [1] * 6000], ids=["many", "uneven", "tiny"])
def test_held_out_rows_come_from_few_row_groups(groups: list[int]) -> None:
    bounds = np.cumsum([0, *groups])
    rows = RowRanges.of([0], [bounds[-1]])
    rest, held = rows.hold_out(5000, bounds)
    assert (len(rest), len(held)) == (len(rows) - 5000, 5000)
    assert not np.isin(held.ids(), rest.ids()).any()
    assert not np.isin(rest.hold_out(500, bounds)[1].ids(), held.ids()).any()
    touched = (np.diff(held.count_below(bounds)) > 0).sum()
    assert touched == {2000: 100, 6000: 5000}.get(len(groups), touched), "few row groups have to be read"
    assert np.diff(held.ids()).max() > 2, "rows of sorted files: the first ones of a group would be of one digit"


def test_pinned_values() -> None:
    """A change of these numbers is a change of every run's result."""
    example = Shuffle(RowRanges.of([0], [10]), np.array([0, 5, 10]), batch_size=2, shuffle_rows=6, seed=0)
    assert batches(example) == [[0, 9], [4, 8], [6, 7], [2, 1], [3, 5]], "as the head of order.py says"
    assert random_numbers(0, 0, np.arange(12)).tolist() == [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
    assert random_numbers(7, 3, np.array([0, 59_999, 2**40])).tolist() == [2, 4, 0]
    assert RowRanges.of([0], [20]).hold_out(4, np.array([0, 20]))[1].ids().tolist() == [0, 5, 8, 16]
    pinned = [-0.0184642, -0.466758, 0.6205059, 0.772669, 0.4082098, -0.7092839]
    assert distortion_draws(0, 0, np.arange(2))[:, :3].ravel().tolist() == pytest.approx(pinned, abs=1e-6)
    assert step_seed(0, 0, 0, RandomStream.DROPOUT) == 5784922337503569493
    assert batches(shuffle_of("in memory"))[0][:6] == [1852, 2749, 424, 2500, 2849, 2958]
    assert batches(shuffle_of("one large"))[0][:6] == [2140, 2169, 2237, 2275, 2332, 2]


def test_draws_are_uniform_and_say_nothing_of_each_other() -> None:
    rows = np.arange(60_000)
    numbers, later = random_numbers(12345, 0, rows), random_numbers(12345, 1, rows)
    draws = distortion_draws(12345, 2, rows)
    assert -1 <= draws.min() < draws.max() < 1
    # 27.9 is the 0.1 % point of chi-square with 9 degrees of freedom; the draws are pinned, so these cannot flicker.
    for values in (numbers, *((draws.T + 1) * 5).astype(np.int64)):
        assert (((np.bincount(values, minlength=10) - 6000) ** 2) / 6000).sum() < 27.9
    assert abs(np.mean(numbers == later) - 0.1) < 0.01
    assert np.abs(np.corrcoef(draws, rowvar=False) - np.eye(DISTORTION_DRAWS)).max() < 0.02
    some = np.array([5, 44_444, 9])
    assert random_numbers(12345, 0, some).tolist() == numbers[some].tolist(), "whatever rows are beside it"
    assert np.array_equal(distortion_draws(12345, 2, some), draws[some])
