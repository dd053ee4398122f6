"""What `--data` names: rows in memory or files, their splits; what cannot be used is refused."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.sources import SPLITS, Source, check_unchanged
from mnistsum_ray.errors import RequestError
from tests.training import open_data as opened

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "there is no Parquet file (.parquet, .pq, .parq)"),
    ({"a": b"cut off"}, "a.parquet: is not Parquet, or was cut off"),
    ({"a": {"image": 0}}, "a.parquet: has no column 'digit' but image; --label-column names an"),
    ({"a": {"digit": 1, "x": 1}}, "a.parquet: has no column 'image' but digit, x; --image-column"),
    ({"a": {"image": 1, "digit": 1}}, "a.parquet: column 'image' has type int8, which holds no im"),
    ({"a": {"image": 0, "digit": 0}}, "column 'digit' has type "),
    ({"day": {"image": 0, "label": 1}, "test": {"image": 0, "label": 1}}, "some files are named"),
]
"""Columns of files by name: 0 is one of images, 1 one of digits."""


@pytest.mark.parametrize(("files", "said"), REFUSED)
def test_a_folder_that_will_not_do_is_refused_by_its_footers(
    tmp_path: Path, sample: pa.Table, files: dict[str, Any], said: str
) -> None:
    for name, content in files.items():
        path = tmp_path / f"{name}.parquet"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(pa.table({name: sample[index] for name, index in content.items()}), path)
    with pytest.raises(RequestError, match=re.escape(said)):
        opened(tmp_path)


NAMES = [
    ("train-00000-of-00001.parquet", "validation-0.parquet", "test-0.parquet"),
    ("training/a.parquet", "val/a.parquet", "testing/a.parquet"),
    ("mnist_Train.parquet", "VALID.pq", "TEST/a.PARQ"),
    ("trainset.parquet", "validationset/a.parquet", "testset.parquet"),
    ("mnistTrain.parquet", "MNISTVal2.parquet", "kaggleData/testdata.parquet"),
]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_files_and_folders_tell_the_split(
    tmp_path: Path, sample: pa.Table, names: Sequence[str]
) -> None:
    for rows, name in enumerate(names, 20):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(sample[:rows].rename_columns({"digit": "label"}), tmp_path / name)
    source = opened(tmp_path)
    assert [source.rows_of(split) for split in SPLITS] == [20, 21, 22]
    assert ([*source.ranges("train")], source.train_rows) == (["train"], 20)


@pytest.mark.parametrize(
    ("rows", "max_rows", "held_out", "train"),
    [
        (1000, None, 0.1, (0.2, 1.0)),
        (100_000, None, 0.05, (0.1, 1.0)),
        (1000, 50, 0.05, (0.2, 0.25)),
    ],
)
def test_a_tenth_is_held_out_for_each_split_and_some_5_000_rows_at_most(
    rows: int, max_rows: int | None, held_out: float, train: tuple[float, float]
) -> None:
    tables = {"train": pa.table({"path": pa.nulls(rows)})}
    source = Source("mine", "mine", "mine", tables).limited(max_rows)
    start = train[0] / 2
    expected = {"test": (0, held_out), "validation": (start, start + held_out), "train": train}
    ranges = source.ranges("train")
    assert {*ranges} == {*expected}
    for split, found in ranges.items():
        assert found == pytest.approx(expected[split])
    assert source.train_rows == round(rows * (train[1] - train[0]))


def test_a_file_that_has_changed_since_its_footer_was_read_is_named(
    tmp_path: Path, sample: pa.Table
) -> None:
    for name in ("1.parquet", "2.parquet"):
        pq.write_table(sample[::50], tmp_path / name)
    source = opened(tmp_path)
    check_unchanged(source)
    for change in (lambda path: pq.write_table(sample[1::50], path), Path.unlink):
        change(tmp_path / "2.parquet")
        with pytest.raises(RequestError, match=r"^--data \S*/2.parquet: has changed while it was"):
            check_unchanged(source)
