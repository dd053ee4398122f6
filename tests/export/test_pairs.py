"""Exported pairs: the number of rows requested, with numbers that the same flags reproduce."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted
from mnistsum_ray.export.pairs import SCHEMA, export_pairs


def run(folder: Path, **settings: Any) -> list[pa.Table]:
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), **settings), print)
    return [pq.read_table(path) for path in sorted(folder.iterdir())]


def test_rows_beyond_the_split_repeat_it_with_other_numbers(tmp_path: Path, sample: pa.Table) -> None:
    tables = run(tmp_path / "a", rows=1201, files=3)
    assert [table.num_rows for table in tables] == [400, 400, 401]
    table = pa.concat_tables(tables)
    assert table.schema.equals(SCHEMA)
    test = open_source("sample").test.ids()
    assert table["row_id"].to_pylist() == [*test, *test, *test[:201]]
    numbers = table["number"].to_numpy()
    assert set(numbers) == set(range(10))
    assert not np.array_equal(numbers[:500], numbers[500:1000])
    source = sample.take(table["row_id"])
    for name in ("image", "digit"):
        assert table[name].to_pylist() == source[name].to_pylist()


def test_the_same_flags_write_the_same_files_and_another_seed_other_numbers(tmp_path: Path) -> None:
    one, other = (run(tmp_path / name, rows=300, files=2) for name in "ab")
    seeded = run(tmp_path / "c", rows=300, files=2, seed=1)
    assert one == other
    assert [table.drop_columns(["number"]) for table in one] == [table.drop_columns(["number"]) for table in seeded]
    assert one != seeded


def test_from_parquet_and_data_that_go_away_are_named_and_not_the_output(tmp_path: Path, sample: pa.Table) -> None:
    (tmp_path / "in").mkdir()
    for name in ("train-a", "train-b", "test-a", "test-b"):
        pq.write_table(sample[::25], tmp_path / "in" / f"{name}.parquet")
    config = ExportPairsConfig(data=str(tmp_path / "in"), output=str(tmp_path / "out"), rows=500, files=1)
    export_pairs(config, print)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table["digit"].to_pylist()[:400] == sample[::25]["digit"].to_pylist() * 2
    assert len(table) == 500

    source = open_source(config.data)
    (tmp_path / "in" / "test-a.parquet").unlink()  # after its footer was read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mnistsum_ray.export.pairs.open_source", lambda _: source)
        with pytest.raises(RunError, match=r"--data .*test-a\.parquet"):
            export_pairs(config.model_copy(update={"output": str(tmp_path / "other")}), print)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match="is not empty"):
        run(tmp_path, rows=10, files=1)


def test_an_interrupt_reports_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mnistsum_ray.export.pairs._parquet_file", interrupt)
    with pytest.raises(RunInterrupted, match="some files are written; empty the folder, then the same command starts again"):
        run(tmp_path / "a", rows=100)
