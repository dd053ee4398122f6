"""Windowed shuffle: every row is in one window of an epoch, and workers and restarts change no window."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from mnistsum_ray.data.parquet_files import RowGroups
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.windowed_shuffle import Window, WindowedShuffle


def groups_of(*rows: int) -> RowGroups:
    return RowGroups(np.arange(len(rows)), np.zeros(len(rows), np.int64), np.cumsum([0, *rows]))


SHAPES = {
    "even": groups_of(*[100] * 100),
    "uneven": groups_of(*np.random.default_rng(1).integers(1, 400, 50).tolist()),
    "tiny": groups_of(*[1] * 3000),
    "one": groups_of(10_000),
    "one large": groups_of(10, 9000, 10),
}


def shuffle_of(shape: str, batch_size: int = 48, shuffle_rows: int = 2000, seed: int = 0) -> WindowedShuffle:
    """The shuffle of all rows but a tenth, which are held out here and there."""
    groups = SHAPES[shape]
    ids = np.arange(groups.bounds[-1])
    return WindowedShuffle(RowRanges.from_ids(ids[ids % 10 != 3]), groups, batch_size, shuffle_rows, seed)


def rows_of(shuffle: WindowedShuffle, window: Window) -> list[int]:
    rows = []
    for group, skip, count in window.slices:
        ids = shuffle.rows.within(int(shuffle.groups.bounds[group]), int(shuffle.groups.bounds[group + 1])).ids()
        assert len(ids) >= skip + count
        rows += ids[skip : skip + count].tolist()
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [7, 48, 256])
@pytest.mark.parametrize("shuffle_rows", [3, 500, 2000])
def test_every_row_is_in_one_window(shape: str, batch_size: int, shuffle_rows: int) -> None:
    shuffle = shuffle_of(shape, batch_size, shuffle_rows)
    for epoch in (0, 1):
        windows = list(shuffle.windows(epoch, range(shuffle.lanes)))
        assert sorted(row for window in windows for row in rows_of(shuffle, window)) == shuffle.rows.ids().tolist()
        assert max(window.rows for window in windows) <= max(1, shuffle_rows // shuffle.lanes)
        for lane, rows in enumerate(shuffle.lane_rows().tolist()):
            mine = [window for window in windows if window.lane == lane]
            assert [window.first for window in mine] == [0, *itertools.accumulate(window.rows for window in mine)][: len(mine)]
            assert sum(window.rows for window in mine) == rows


def test_lanes_fill_the_batches_exactly() -> None:
    shuffle = shuffle_of("uneven", batch_size=50)
    full, rest = divmod(len(shuffle.rows), 50)
    taken = np.bincount([position % shuffle.lanes for _ in range(full) for position in range(50)], minlength=shuffle.lanes)
    taken += np.bincount([position % shuffle.lanes for position in range(rest)], minlength=shuffle.lanes)
    assert shuffle.lane_rows().tolist() == taken.tolist()


def test_the_windows_of_some_lanes_do_not_depend_on_the_others() -> None:
    shuffle = shuffle_of("uneven")
    whole = list(shuffle.windows(3, range(shuffle.lanes)))
    for workers in (2, 3, 5):
        for rank in range(workers):
            lanes = range(rank, shuffle.lanes, workers)
            assert list(shuffle.windows(3, lanes)) == [window for window in whole if window.lane in lanes]


def test_from_a_step_on_the_windows_are_those_that_are_still_needed() -> None:
    shuffle = shuffle_of("even")
    whole = list(shuffle.windows(0, range(shuffle.lanes)))
    step = shuffle.steps // 2
    rest = list(shuffle.windows(0, range(shuffle.lanes), step))
    needed = [window for window in whole if window.first + window.rows > step * shuffle.rows_per_step(window.lane)]
    by_lane = functools.partial(sorted, key=lambda window: (window.lane, window.first))
    assert by_lane(rest) == by_lane(needed)
    assert 0 < len(rest) < len(whole)


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    shuffle = shuffle_of("uneven")

    def order(shuffle: WindowedShuffle, epoch: int) -> list[Window]:
        return list(shuffle.windows(epoch, range(shuffle.lanes)))

    assert order(shuffle, 0) == order(replace(shuffle), 0)
    assert order(shuffle, 0) != order(shuffle, 1)
    assert order(shuffle, 0) != order(replace(shuffle, seed=1), 0)


def test_pinned_values() -> None:
    """A change of these is a change of every streamed run's result."""
    windows = itertools.islice(shuffle_of("uneven").windows(0, range(8)), 4)
    assert [(window.lane, window.first, window.slices) for window in windows] == PINNED


def test_there_are_as_many_lanes_as_windows_can_hold_row_groups() -> None:
    lanes = [replace(shuffle_of("even", batch_size=256), shuffle_rows=rows).lanes for rows in (6400, 5000, 2500, 1000, 10)]
    assert lanes == [64, 32, 16, 8, 8]
    assert shuffle_of("even", batch_size=5).lanes == 5


def test_a_row_group_is_read_once_where_a_window_holds_it() -> None:
    assert shuffle_of("even", shuffle_rows=6400).rows_read_per_row == 1
    assert shuffle_of("one", shuffle_rows=2000).rows_read_per_row > 10


def test_the_lanes_reach_the_ends_of_their_windows_one_after_the_other() -> None:
    shuffle = shuffle_of("tiny", batch_size=64, shuffle_rows=640)
    ends = [window.rows for window in shuffle.windows(0, range(shuffle.lanes)) if window.first == 0]
    assert ends == sorted(ends)
    assert ends[-1] - ends[0] >= 0.8 * shuffle.window_rows


PINNED = [(0, 0, ((37, 0, 31),)), (1, 0, ((16, 14, 62),)), (2, 0, ((17, 144, 54), (29, 0, 39))), (3, 0, ((13, 149, 125),))]
