"""RowRanges beside plain sets of ids."""

import numpy as np
import pytest

from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import mix_ids

RANDOM = np.random.default_rng(0)
IDS = np.sort(RANDOM.choice(5000, 1500, replace=False))


@pytest.mark.parametrize(
    "ids", [IDS, np.arange(100, 5000), np.array([7]), np.array([], np.int64)], ids=["many", "one", "id", "none"]
)
def test_all_answers_are_those_of_a_set(ids: np.ndarray) -> None:
    ranges = RowRanges.from_ids(ids)
    assert len(ranges) == len(ids)
    assert np.array_equal(ranges.ids(), ids)
    assert (ranges.id_sum - int(mix_ids(ids).sum())) % 2**64 == 0
    bounds = np.array([0, 1, 7, 8, 2500, 4999, 5000, 9000])
    assert ranges.count_below(bounds).tolist() == [int((ids < bound).sum()) for bound in bounds]
    for first, end in ((0, 5000), (7, 8), (2500, 2600), (4000, 3000), (6000, 7000)):
        assert np.array_equal(ranges.within(first, end).ids(), ids[(ids >= first) & (ids < end)])
    some = RANDOM.choice(len(ids), min(len(ids), 50), replace=False)
    assert np.array_equal(ranges.at(some), ids[some])
    removed = np.sort(ids[some])
    assert np.array_equal(ranges.minus(RowRanges.from_ids(removed)).ids(), np.setdiff1d(ids, removed))


def test_ranges_that_touch_become_one_and_empty_ones_go() -> None:
    ranges = RowRanges.of([0, 5, 9, 12], [5, 9, 9, 13])
    assert (ranges.starts.tolist(), ranges.ends.tolist()) == ([0, 12], [9, 13])
