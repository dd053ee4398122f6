"""Bad rows and bad files: each is reported with its place and reason, and everything else is scored."""

import html
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from mnistsum_ray.cluster.tasks import crash_counter
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.errors import RunError
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

FILES, ROWS_A_FILE, GROUP = 5, 715, 100  # 3,575 rows; every fifth is bad in one of four ways

BAD_FILES = 4

GOOD = FILES * ROWS_A_FILE * 4 // 5

pytestmark = pytest.mark.usefixtures("cluster")


# Values that replace the image or the number of a row, and the reason that the row gets. More of them: tests/data.
WAYS: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "the image is null"),
    ({"image": b"no"}, "2 bytes are neither 784 pixels nor a readable PNG or JPEG"),
    ({"number": 10}, "the number is 10, not one of 0..9"),
    ({"number": -1, "image": None}, "the image is null; fill it in or drop the row; the number is -1"),
]


def rows_of(sample: pa.Table, file: int) -> tuple[pa.Table, Pixels, np.ndarray]:
    places = (np.arange(ROWS_A_FILE) * 7 + file) % 5000
    images = pixels_view(one_chunk(sample["image"].take(pa.array(places))))
    numbers = places % 10
    rows: list[dict[str, Any]] = [
        {"id": f"{file}-{row}", "image": image.tobytes(), "number": int(number), "reason": "text"}
        for row, (image, number) in enumerate(zip(images, numbers, strict=True))
    ]
    for row in range(0, ROWS_A_FILE, 5):
        rows[row] |= WAYS[row // 5 % len(WAYS)][0]
    kind = pa.schema({"id": pa.string(), "image": pa.binary(), "number": pa.int16(), "reason": pa.string()})
    return pa.Table.from_pylist(rows, kind), images, numbers


def write_bad_files(folder: Path, good: pa.Table) -> dict[str, str]:
    """Write files whose name, footer, columns and pages cannot be used; return the reason that each gets."""
    pq.write_table(good, folder / "bad_pages.parquet")
    whole = (folder / "bad_pages.parquet").read_bytes()
    (folder / "bad_pages.parquet").write_bytes(whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :])
    (folder / "bad_cut.parquet").write_bytes(whole[:-1000])
    pq.write_table(good.drop_columns(["number"]), folder / "bad_missing.parquet")
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.parquet")).write_bytes(whole)
    return {
        "latin-\\udce9.parquet": "its name is not UTF-8",
        "bad_cut.parquet": "was cut off",
        "bad_missing.parquet": "has no column 'number'",
        "bad_pages.parquet": "cannot be read",
    }


@pytest.fixture(scope="module")
def source(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad") / "in"
    folder.mkdir()
    for file in range(FILES):
        pq.write_table(rows_of(sample, file)[0], folder / f"{file:02}.parquet", row_group_size=GROUP)
    return folder, write_bad_files(folder, rows_of(sample, 0)[0])


@pytest.fixture(scope="module")
def scored(model: Path, source: tuple[Path, dict[str, str]]) -> Scored:
    return score_here(model, source[0].parent / "out", source[0], label_column=None, max_rows_per_file=300)


def test_counts_add_up_and_every_bad_file_is_named_with_its_reason(scored: Scored, source: tuple[Path, dict[str, str]]) -> None:
    line = scored.line
    assert (line["files"], line["failed_files"]) == (FILES + BAD_FILES, BAD_FILES)
    assert (line["scored_rows"], line["rejected_rows"]) == (GOOD, FILES * ROWS_A_FILE - GOOD)
    assert line["failed_rows"] == 2 * ROWS_A_FILE, "of the files whose footers can be read"
    assert line["input_rows"] == (FILES + 2) * ROWS_A_FILE
    assert f"scored {GOOD:,} of {line['input_rows']:,} rows in {FILES + BAD_FILES} files" in scored.said
    manifest = scored.manifest()
    assert sum(manifest["rejected_by_reason"].values()) == manifest["totals"]["rejected_rows"] == line["rejected_rows"]
    files = scored.files()
    for name, reason in source[1].items():
        file = files.pop(name)
        assert (file["status"], file["scored"], file["rejected"]) == ("failed", 0, 0)
        assert reason in file["reason"]
        (written,) = [said for said in scored.said.splitlines() if said.startswith(f"cannot be used: {name}: ")]
        assert reason in written
        assert not list((scored.output / "predictions").glob(f"{Path(name).stem}*"))
    bad = ROWS_A_FILE // 5
    rows = {"rows": ROWS_A_FILE, "scored": ROWS_A_FILE - bad, "rejected": bad, "failed": 0, "status": "scored", "reason": None}
    assert files == {f"{file:02}.parquet": {"file": f"{file:02}.parquet"} | rows for file in range(FILES)}


def test_every_bad_row_is_reported_with_its_place_reason_and_values(
    scored: Scored, source: tuple[Path, dict[str, str]], sample: pa.Table
) -> None:
    file = FILES - 1
    table, _, _ = rows_of(sample, file)
    paths = sorted((scored.output / "rejected").glob(f"{file:02}-*.parquet"))
    rejected = [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]
    assert [row["source_row"] for row in rejected] == list(range(0, ROWS_A_FILE, 5))
    for row in rejected:
        place = row["source_row"]
        assert row["source_file"] == str(source[0] / f"{file:02}.parquet")
        assert WAYS[place // 5 % len(WAYS)][1] in row["reason"]
        original = table.slice(place, 1).to_pylist()[0]
        assert (row["id"], row["image"], row["number"]) == (original["id"], original["image"], original["number"])
        assert row["input_reason"] == "text"


def test_the_page_names_bad_rows(scored: Scored) -> None:
    page = html.unescape((scored.output / "report.html").read_text())
    manifest = scored.manifest()
    for reason, count in list(manifest["rejected_by_reason"].items())[:10]:
        assert f"<td>{count:,}</td><td>{reason}</td><td>" in page
    assert re.search(r"\d\d\.parquet, row \d+; \d\d\.parquet, row \d+", page), "examples"


def test_the_good_rows_of_the_same_file_are_scored(scored: Scored, model: Path, sample: pa.Table) -> None:
    file = 3
    _, images, numbers = rows_of(sample, file)
    good = np.array([row for row in range(ROWS_A_FILE) if row % 5])
    paths = sorted((scored.output / "predictions").glob(f"{file:02}-*.parquet"))
    assert len(paths) > 1
    table = pa.concat_tables([pq.ParquetFile(path).read() for path in paths])
    assert table["id"].to_pylist() == [f"{file}-{row}" for row in good]
    check_predictions(table, plain_predictions(model, images[good], numbers[good]))


def test_a_later_run_scores_only_what_is_new(
    scored: Scored, model: Path, source: tuple[Path, dict[str, str]], sample: pa.Table, tmp_path: Path
) -> None:
    """Of a file that was repaired and a new bad one."""
    output, folder = Path(shutil.copytree(scored.output, tmp_path / "out")), tmp_path / "in"
    before = {path: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    shutil.copytree(source[0], folder)
    (folder / "late.parquet").write_bytes(b"no")
    pq.write_table(rows_of(sample, 3)[0], folder / "bad_cut.parquet")
    late = score_here(model, output, folder, max_rows_per_file=300)
    assert late.line["failed_files"] == BAD_FILES
    done = scored.line["scored_rows"] + scored.line["rejected_rows"]
    assert late.line["resumed_rows"] == done
    assert late.line["scored_rows"] + late.line["rejected_rows"] == done + ROWS_A_FILE
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_strict_fails_without_a_manifest(model: Path, source: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_rows_per_file": 300}
    with pytest.raises(RunError, match=r"^--strict: 715 rows and 4 files cannot be used, so there is no manifest"):
        score_here(model, tmp_path / "out", source[0], strict=True, **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = score_here(model, tmp_path / "out", source[0], **settings)
    assert (done.line["resumed_rows"], done.line["rejected_rows"]) == (FILES * ROWS_A_FILE, 715)


def test_all_rows_bad_and_no_rows_at_all(model: Path, tmp_path: Path) -> None:
    """A path beside an image, as Hugging Face writes it, is not followed."""
    (tmp_path / "in").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "secret.png")
    places = ["../secret.png", str(tmp_path / "secret.png")]
    tables = {
        "none": pa.table({"image": pa.array([], pa.binary()), "number": pa.array([], pa.int8())}),
        "nulls": pa.table({"image": pa.nulls(3), "number": pa.nulls(3)}),
        "paths": pa.table({"image": [{"bytes": None, "path": path} for path in places], "number": [1, 2]}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    scored = score_here(model, tmp_path / "out", tmp_path / "in")
    assert (scored.line["input_rows"], scored.line["scored_rows"], scored.line["rejected_rows"]) == (5, 0, 5)
    assert scored.files()["none.parquet"]["status"] == "scored"
    assert scored.table("none.parquet").num_rows == 0
    assert scored.table("none.parquet").column_names == scored.table("nulls.parquet").column_names
    reason = "the image is null; fill it in or drop the row; the number is null; fill it in or drop the row"
    assert scored.table("nulls.parquet", "rejected")["reason"].to_pylist() == [reason] * 3


def test_work_that_fails_leaves_no_crash_counter() -> None:
    """The error's traceback would keep it."""
    with pytest.raises(RunError) as error, crash_counter() as counter:
        raise RunError(ray.get(counter.begin.remote("file", "node")))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(counter.begin.remote("file", "node"))
    assert error.tb, "which holds the counter"
