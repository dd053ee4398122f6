"""Files and row groups of a Parquet source: held-out rows, samples, and what has changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data import sources
from mnistsum_ray.data.parquet_files import ParquetFiles, RowGroups
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sources import open_source


def groups_of(*rows: int) -> RowGroups:
    return RowGroups(np.arange(len(rows)), np.zeros(len(rows), np.int64), np.cumsum([0, *rows]))


@pytest.mark.parametrize(
    "groups",
    [groups_of(*[1000] * 2000), groups_of(2_000_000), groups_of(3, 5, 10**6, 7, 10**6), groups_of(*[1] * 6000)],
    ids=["many", "one", "uneven", "tiny"],
)
def test_held_out_rows_are_the_first_ones_of_some_groups(groups: RowGroups) -> None:
    rows = RowRanges.of([0], [int(groups.bounds[-1])])
    held = groups.held_out(rows, 5000)
    assert len(held) == 5000
    assert np.array_equal(held.ids(), groups.held_out(rows, 5000).ids())
    rest = rows.minus(held)
    assert len(rest) == len(rows) - 5000
    again = groups.held_out(rest, 500)
    assert len(again) == 500
    assert not np.isin(again.ids(), held.ids()).any()
    if len(groups) == 2000:
        counts = groups.counts(held)
        assert (counts > 0).sum() == 100, "few row groups have to be read"
        assert counts.max() == 50


def test_a_sample_comes_from_groups_over_the_whole() -> None:
    groups = groups_of(*[1000] * 2000)
    sample = groups.sample(RowRanges.of([500], [2_000_000]), 4096)
    assert len(sample) == 4000
    touched = np.flatnonzero(groups.counts(sample))
    assert len(touched) == 100
    assert np.diff(touched).max() <= 21
    uneven = groups_of(*[1] * 100, 900)
    assert uneven.counts(uneven.sample(RowRanges.of([0], [1000]), 100))[-1] == 90, "a large group has its share"


@pytest.fixture
def folder(tmp_path: Path, sample: pa.Table) -> Path:
    for name in "abc":
        pq.write_table(sample[::50], tmp_path / f"{name}.parquet", row_group_size=30)
    return tmp_path


def files_of(folder: Path) -> ParquetFiles:
    files = open_source(str(folder)).files
    assert files is not None
    return files


def test_parts_and_groups_agree_about_row_ids(folder: Path) -> None:
    files = files_of(folder)
    assert files.groups.bounds[-1] == 300
    assert [part.first_id for part in files.parts()] == files.first_ids.tolist() == [0, 100, 200]
    assert [part.first_id for part in files.parts(RowRanges.of([150], [151]))] == [100]
    assert files.groups.file.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_changed_file_is_named(folder: Path, sample: pa.Table) -> None:
    before = files_of(folder)
    assert before.changed_file(before.table, same_place=True) is None
    pq.write_table(sample[1::50], folder / "b.parquet", row_group_size=30)
    pq.write_table(sample[1::50], folder / "d.parquet", row_group_size=30)
    after = files_of(folder)
    assert after.changed_file(before.table, same_place=False) == f"{folder}/b.parquet: has changed since the run began"
    without = replace(after, table=pa.concat_tables([before.table, after.table.slice(3)]))
    assert without.changed_file(before.table, same_place=True) == f"{folder}/d.parquet: is new since the run began"
    gone = replace(before, table=before.table.slice(1))
    assert gone.changed_file(before.table, same_place=True) == f"{folder}/a.parquet: is missing; it was there when the run began"


def test_a_copy_has_other_times_and_the_same_fingerprint(folder: Path) -> None:
    before = files_of(folder)
    times = pa.array([1, 2, 3])
    copy = replace(before, table=before.table.set_column(2, before.table.schema.field("modified"), times))
    splits = (RowRanges.of([0], [300]),)
    assert copy.fingerprint(splits) == before.fingerprint(splits)
    assert copy.changed_file(before.table, same_place=False) is None
    assert "a.parquet: has changed" in str(copy.changed_file(before.table, same_place=True))


def test_of_many_rows_whole_stretches_are_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scattered = open_source(str(folder))
    monkeypatch.setattr(sources, "_MAX_SCATTERED_ROWS", 299)
    source = open_source(str(folder))
    assert [len(split) for split in source.splits] == [len(split) for split in scattered.splits] == [240, 30, 30]
    assert sorted(np.concatenate([split.ids() for split in source.splits])) == list(range(300))
    assert len(source.test.starts) <= 12 < len(scattered.test.starts)
