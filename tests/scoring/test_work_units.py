"""Every part is in exactly one work unit, and every worker gets several."""

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import split_into_parts
from mnistsum_ray.scoring.work_units import make_work_units
from tests.scoring.test_parts import input_files


def test_one_large_row_group_keeps_all_readers_busy() -> None:
    parts, _ = split_into_parts(input_files([1_000_000]), 8_192)
    units = make_work_units(parts, 8_192, 15)
    assert 15 <= len(units) <= 16


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
def test_units_hold_every_part_once_and_in_order(sizes: list[list[int]], workers: int) -> None:
    parts, _ = split_into_parts(input_files(*sizes), 16_384)
    units = make_work_units(parts, 16_384, workers)
    assert pa.concat_tables(units).equals(parts)
    for unit in units:
        names = unit["name"].unique()
        assert unit.num_rows >= 1
        assert len(names) <= 256
    if sizes == [[1250]] * 8:
        assert len(units) >= min(8, workers)
    if sizes == [[1_000_000]]:
        assert len(units) == min(16, 4 * workers), "each unit reads the row group from its start"


def test_small_files_share_a_unit() -> None:
    parts, _ = split_into_parts(input_files(*[[10]] * 2000), 16_384)
    assert len(make_work_units(parts, 16_384, 2)) == 8
