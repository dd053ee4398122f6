"""Every part is in exactly one task, and every worker gets several."""

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import make_tasks, split_into_parts
from tests.scoring.test_parts import input_files


def test_one_large_row_group_keeps_all_workers_busy() -> None:
    parts, _ = split_into_parts(input_files([1_000_000]), 8_192)
    tasks = make_tasks(parts, 8_192, 15)
    assert 15 <= len(tasks) <= 16


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize(
    "sizes",
    [
        [[10]] * 2000,  # many small files
        [[1250]] * 8,  # a few
        [[1_000_000]],  # one huge row group
        [[10], [50_000], [10], [16_384] * 5, [0], [40_000, 3]],
    ],
)
def test_tasks_hold_every_part_once_and_in_order(sizes: list[list[int]], workers: int) -> None:
    parts, _ = split_into_parts(input_files(*sizes), 16_384)
    tasks = [parts.slice(task["first"], task["count"]) for task in make_tasks(parts, 16_384, workers)]
    assert pa.concat_tables(tasks).equals(parts)
    for task in tasks:
        names = task["name"].unique()
        assert task.num_rows >= 1
        assert len(names) <= 256
    if sizes == [[1250]] * 8:
        assert len(tasks) >= min(8, workers)
    if sizes == [[1_000_000]]:
        assert len(tasks) == min(16, 4 * workers), "each task reads the row group from its start"


def test_small_files_share_a_task() -> None:
    parts, _ = split_into_parts(input_files(*[[10]] * 2000), 16_384)
    assert len(make_tasks(parts, 16_384, 2)) == 8
