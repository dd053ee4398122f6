"""Reading parts: every row is read once, in order, and damaged files are reported. Written parts: columns, metadata, stamp."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.errors import StorageError, UnusableFileError
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.scoring.counts import encode_image
from mnistsum_ray.scoring.output import OutputFiles
from mnistsum_ray.scoring.parts import COUNTS_KEY, KEY
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.worker import PartRows, background_warning, read_parts
from tests.scoring.conftest import CONSOLE, parts_of, plan_of, write_all


def write(path: Path, rows: int, group: int) -> pa.Table:
    images = [(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(rows)]
    labels = [None if row % 3 == 0 else row % 10 for row in range(rows)]
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"id": range(rows), "image": images, "number": [row % 11 for row in range(rows)], "label": labels})
    pq.write_table(table, path, row_group_size=group)
    return table


def read(plan: Plan) -> list[PartRows | UnusableFileError]:
    return [rows for _, rows in read_parts(plan.inputs.root, parts_of(plan), plan.config)]


@pytest.mark.parametrize(("max_rows_per_file", "group"), [(7, 90), (100, 1000), (500, 90), (2000, 90)])
def test_every_row_is_read_once_in_order_and_decoded(tmp_path: Path, max_rows_per_file: int, group: int) -> None:
    table = write(tmp_path / "a.parquet", 1000, group)
    plan = plan_of(tmp_path, max_rows_per_file=max_rows_per_file, label_column="label")
    position = 0
    for decoded in read(plan):
        assert isinstance(decoded, PartRows)
        assert decoded.part.first_row == position
        ids = np.arange(position, position + decoded.part.rows)
        assert decoded.table["id"].to_pylist() == ids.tolist()
        assert decoded.table.column_names == table.column_names
        bad = ids % 11 == 10
        assert list(decoded.reasons) == np.flatnonzero(bad).tolist()
        assert decoded.numbers.tolist() == np.where(bad, 0, ids % 11).tolist()
        assert decoded.labels.tolist() == [-1 if row % 3 == 0 else row % 10 for row in ids]
        assert [image.tobytes() for image in decoded.images] == table["image"].take(pa.array(ids)).to_pylist()
        position += decoded.part.rows
    assert position == 1000
    some = parts_of(plan)[1::3]
    read_ids = [rows.table["id"].to_pylist() for _, rows in read_parts(plan.inputs.root, some, plan.config)]  # type: ignore[union-attr]
    assert read_ids == [list(range(part.first_row, part.first_row + part.rows)) for part in some], "with others between them"


def test_images_on_the_other_background_are_worth_a_warning(tmp_path: Path, sample: pa.Table) -> None:
    """Rejected rows, which are zeros, do not count."""
    pixels = pixels_view(sample["image"].combine_chunks())[::500]
    for name, images in {"dark.parquet": pixels, "light.parquet": 255 - pixels}.items():
        column = [image.tobytes() for image in images] + [b"bad"] * 30
        pq.write_table(pa.table({"image": column, "number": [1] * 40}), tmp_path / name)
    dark, light = read(plan_of(tmp_path))
    for trained, good, other in ((0, dark, light), (255, light, dark)):
        assert isinstance(good, PartRows)
        assert isinstance(other, PartRows)
        assert background_warning(good, trained) is None
        assert f"warning: {other.part.name}: its images are" in str(background_warning(other, trained))


VIEWS = {
    "string_view": pa.array(["a", None, "c"], pa.string_view()),
    "binary_view": pa.array([b"a", None, b"c"], pa.binary_view()),
    "list_view": pa.array([[1], None, [2, 3]], pa.list_view(pa.int64())),
    "struct of string_view": pa.array([{"x": "a"}, None, {"x": "c"}], pa.struct({"x": pa.string_view()})),
    "map of string_view": pa.array([[("k", "a")], None, [("k", "c")]], pa.map_(pa.string(), pa.string_view())),
    "null in a struct": pa.array([{"a": [{"b": row, "c": None}]} for row in range(3)]),
}


def test_with_view_columns_only_the_bad_row_is_rejected(tmp_path: Path) -> None:
    """pyarrow cannot take rows of views, and cannot cast a slice of structs with a null child."""
    images = pa.array([(np.arange(784) + row).astype(np.uint8).tobytes() for row in range(3)], pa.binary_view())
    pq.write_table(pa.table({"image": images, "number": [77, 1, 2], **VIEWS}), tmp_path / "a.parquet")
    plan = plan_of(tmp_path / "a.parquet", tmp_path / "out" / "deep", max_rows_per_file=2)
    assert [image.tobytes() for rows in read(plan) for image in rows.images] == images.to_pylist()  # type: ignore[union-attr]
    write_all(plan)
    good, bad = (
        pa.concat_tables([pq.ParquetFile(path).read() for path in sorted((tmp_path / "out" / "deep" / folder).iterdir())])
        for folder in ("predictions", "rejected")
    )
    for name, values in VIEWS.items():
        assert good[name].to_pylist() == values.to_pylist()[1:], name
        assert bad[name].to_pylist() == values.to_pylist()[:1], name


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with eight rows in two parts, the last five bad; the folder of its output."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    columns = {"number": [1, 2, 3, 44, 55, 66, 77, 88], "Reason": ["a"] * 8, "label": [0, 1, None, 3, 4, 5, 6, 7]}
    table = pa.table({"image": [bytes([row] * 784) for row in range(8)], **columns})
    table = table.replace_schema_metadata({b"pandas": b"{}", b"huggingface": b"{}", b"mine": b"yes"})
    pq.write_table(table, tmp_path / "in" / "deep" / "a.parquet", row_group_size=1)
    write_all(written_plan(tmp_path))
    return tmp_path / "out"


def written_plan(folder: Path) -> Plan:
    return plan_of(folder / "in", folder / "out", max_rows_per_file=4, label_column="label")


NAME = "deep/a-00000-of-00002.parquet"


def output_files(output: Path) -> OutputFiles:
    return OutputFiles.read(written_plan(output.parent), CONSOLE)


def test_the_files_of_a_part_and_their_stamp(written: Path) -> None:
    good = pq.ParquetFile(written / "predictions" / NAME).read()
    assert good.column_names == ["number", "Reason", "label", *PREDICTION_FIELDS.names]
    assert good["consistent"].to_pylist() == [False, True, True]
    assert good.schema.metadata.keys() == {b"pandas", b"mine", KEY, COUNTS_KEY}, "all of the input but what names its columns"
    bad = pq.ParquetFile(written / "rejected" / NAME).read()
    assert bad.column_names == ["image", "number", "input_Reason", "label", "source_file", "source_row", "reason"]
    source = str(written.parent / "in" / "deep" / "a.parquet")
    reason = "the number is 44, not one of 0..9; correct it or drop the row"
    assert bad.select(["source_file", "source_row", "reason"]).to_pylist() == [
        {"source_file": source, "source_row": 3, "reason": reason}
    ]
    found = output_files(written)
    first, last = found.stamps.to_pylist()
    fields = ("planned", "rows", "rejected")
    assert [[stamp[name] for name in fields] for stamp in (first, last)] == [[True, 4, 1], [True, 4, 4]]
    counts = found.counts
    assert counts.consistent == 2
    assert counts.unsure[1:] == [
        [0.5, "deep/a.parquet", 1, 1, 2, 1, encode_image(np.full((28, 28), 1, np.uint8))],
        [0.5, "deep/a.parquet", 2, 2, 3, None, encode_image(np.full((28, 28), 2, np.uint8))],
    ]
    assert counts.accuracies() == {"digit_accuracy": 1.0, "sum_accuracy": 0.5}


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "predictions" / NAME).write_bytes(b"PAR1 no PAR1"), "has a damaged footer"),
        (lambda folder: (folder / "rejected" / NAME).unlink(), "has 3 predictions and 0 rejected rows of 4 rows"),
        (lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "predictions" / NAME), "is not a file of this prog"),
    ],
)
def test_damaged_output_files_are_refused(written: Path, damage: Any, error: str) -> None:
    damage(written)
    assert output_files(written).errors[0].startswith(f"predictions/{NAME} {error}")


def test_parts_that_an_earlier_process_has_committed_stay(written: Path) -> None:
    """A process has died after the first of two parts."""
    plan, files = written_plan(written.parent), sorted(written.rglob("*.parquet"))
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    write_all(plan)
    with pytest.raises(StorageError, match="cannot be written: another run has written something there"):
        write_all(replace(plan, precision="bf16"))
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
