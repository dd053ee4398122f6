"""Exported pairs: the number of rows requested, with numbers that the same flags reproduce."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.pairs import ExportPairsConfig, export_pairs


def run(folder: Path, **settings: Any) -> list[pa.Table]:
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), **settings), print)
    return [pq.read_table(path) for path in sorted(folder.iterdir())]


TEST_ROWS = 437
"""Of the bundled sample."""


def test_rows_beyond_the_split_repeat_it_with_other_numbers(
    tmp_path: Path, sample: pa.Table
) -> None:
    tables = run(tmp_path / "a", rows=1201, files=3)
    assert [table.num_rows for table in tables] == [400, 400, 401]
    table = pa.concat_tables(tables)
    test = table[:TEST_ROWS]
    ids = test["row_id"].to_pylist()
    assert len({*ids}) == TEST_ROWS
    assert table["row_id"].to_pylist() == [*ids, *ids, *ids][:1201]
    assert np.bincount(test["digit"].to_numpy()).min() > 25, "all digits, of rows sorted by digit"
    numbers = table["number"].to_numpy()
    assert set(numbers) == set(range(10))
    assert not np.array_equal(numbers[:TEST_ROWS], numbers[TEST_ROWS : 2 * TEST_ROWS])
    digits = dict(zip(sample["image"].to_pylist(), sample["digit"].to_pylist(), strict=True))
    images = table["image"].to_pylist()
    assert [digits[image] for image in images] == table["digit"].to_pylist()
    assert run(tmp_path / "b", rows=1201, files=3) == tables
    assert run(tmp_path / "c", rows=1201, files=3, seed=1) != tables
    with pytest.raises(RequestError, match="is not empty"):
        run(tmp_path / "a", rows=10, files=1)
    with pytest.raises(RequestError, match=r"^--files: more files than --rows 1; lower --files"):
        run(tmp_path / "d", rows=1, files=100)
    config = ExportPairsConfig(data=str(tmp_path / "a"), output=str(tmp_path / "d"))
    with pytest.raises(RequestError, match="/a: is Parquet already; give it a column of numbers"):
        export_pairs(config, print)
