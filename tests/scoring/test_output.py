"""The output folder: lost and repeated rows are found, unfinished files deleted, requests not mixed."""

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError, RowCountError, RunError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring import publish
from mnistsum_ray.scoring.output import MANIFEST, OutputFiles, reconcile, resume
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.publish import check_strict, result_line
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.lock import FolderLock
from tests.scoring.conftest import CONSOLE, plan_of, write_all


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of 40 rows, of which row 30 is bad, and of 7 rows; and two that cannot be used, of which one
    says that it has 5 rows."""
    monkeypatch.setattr(publish, "draw_pictures", lambda *_: {})  # takes seconds
    (tmp_path / "in").mkdir()
    for name, rows in (("a", 40), ("b", 7), ("other", 5)):
        numbers = [77 if row == 30 else 1 for row in range(rows)]
        second = [77 if row == 35 else 1 for row in range(rows)]
        images = {"picture" if name == "other" else "image": [bytes(784)] * rows}
        table = pa.table(images | {"number": numbers, "second": second, "label": [1] * rows})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet", row_group_size=10)
    (tmp_path / "in" / "broken.parquet").touch()
    return tmp_path


def plan_in(folder: Path, **settings: Any) -> Plan:
    given: dict[str, Any] = {"max_rows_per_file": 20, "label_column": "label"} | settings
    return plan_of(folder / "in", folder / "out", **given)


def test_all_rows_are_counted(folder: Path) -> None:
    plan = plan_in(folder)
    write_all(plan)
    output = OutputFiles.read(plan, CONSOLE)
    files, counts = reconcile(plan, output.stamps), output.counts
    rows = [list(row.values()) for row in files.to_pylist()]
    assert rows[:2] == [
        ["a.parquet", 40, 39, 1, 0, "scored", None],
        ["b.parquet", 7, 7, 0, 0, "scored", None],
    ]
    assert rows[2] == ["broken.parquet", None, 0, 0, None, "failed", "is empty (0 bytes); write it again"]
    assert rows[3][:6] == ["other.parquet", 5, 0, 0, 5, "failed"]
    line = result_line(plan, files, counts, 0, 2.0)
    names = ("input_rows", "scored_rows", "rejected_rows", "failed_rows", "files", "failed_files")
    assert [line[name] for name in names] == [52, 46, 1, 5, 4, 2]
    assert (line["rows_per_second"], line["digit_accuracy"]) == (23.5, 5 / 46)
    ((reason, count),) = counts.reasons.items()
    assert (count, counts.examples) == (1, {reason: [["a.parquet", 30]]})
    assert counts.confusion == [[0] * 10, [4, *[5] * 6, 4, 4, 4], *[[0] * 10] * 8], "all labels are 1"
    assert len(counts.unsure) == 1, "the same image once"


def part(folder: Path, of: str = "predictions") -> Path:
    return folder / "out" / of / "a-00001-of-00002.parquet"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


@pytest.mark.parametrize(
    ("damage", "there"),
    [
        (lambda folder: rewrite(part(folder), lambda table: table.slice(1)), "18 predictions and 1 rejected"),
        (lambda folder: rewrite(part(folder), lambda table: pa.concat_tables([table, table[18:]])), "20 predictions and 1"),
        (lambda folder: rewrite(part(folder, "rejected"), lambda table: table.slice(1)), "19 predictions and 0 rejected"),
        (lambda folder: part(folder).unlink(), None),
        (lambda folder: shutil.copy(part(folder).with_name("a-00000-of-00002.parquet"), part(folder)), None),
    ],
    ids=["missing", "twice", "rejected missing", "no file", "other rows"],
)
def test_a_part_that_differs_from_the_plan_is_named(folder: Path, damage: Callable[[Path], object], there: str | None) -> None:
    plan = plan_in(folder)
    write_all(plan)
    damage(folder)
    with pytest.raises(RowCountError, match=r"a\.parquet: rows 20 to 39 should be in predictions/a-00001"):
        reconcile(plan, OutputFiles.read(plan, CONSOLE).stamps)
    if there:
        with pytest.raises(RequestError, match=f"predictions/a-00001-of-00002.parquet has {there}.*; move it away"):
            resume(plan, CONSOLE)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


PARTS = {f"predictions/a-0000{number}-of-00002.parquet" for number in range(2)} | {"predictions/b.parquet"}
REJECTED = "rejected/a-00001-of-00002.parquet"


def test_what_a_killed_run_left_unfinished_is_deleted_and_the_rest_is_resumed(folder: Path) -> None:
    write_all(plan_in(folder))
    part(folder).unlink()  # its rejected rows are there, which are written first
    unfinished = (".mnistsum-partial-0123456789abcdef", "predictions/b/.mnistsum-partial-0123456789abcdef")
    hidden = (".mnistsum-notes.partial", "b/.download.partial", "predictions/.ipynb_checkpoints/a.parquet", "_SUCCESS", "_x/y")
    fill(folder / "out", *unfinished, *hidden)
    (folder / "in" / "b.parquet").unlink()
    said = io.StringIO()
    _, todo = resume(plan_in(folder), Console(said))
    assert names(folder / "out") == PARTS - {"predictions/a-00001-of-00002.parquet"} | {*hidden}
    assert todo["output"].to_pylist() == ["a-00001-of-00002.parquet"]
    assert "left as they are: 1 output files of input that is not there now, such as" in said.getvalue()


@pytest.mark.parametrize("other", ["thesis.tex.partial", "predictions/c.parquet", "rejected/notes.txt"])
def test_a_file_of_others_is_refused_before_anything_is_deleted(folder: Path, other: str) -> None:
    write_all(plan_in(folder))
    fill(folder / "out", other, ".mnistsum-partial-0123456789abcdef")
    before = names(folder / "out")
    with pytest.raises(RequestError, match=f"{other} .*move it away"):
        resume(plan_in(folder, overwrite=True), CONSOLE)
    assert names(folder / "out") == before
    shutil.rmtree(folder / "out")
    fill(folder / "out", "manifest.json")  # others use this name, too
    with pytest.raises(RequestError, match=r"manifest\.json is not a file of this program; move it away"):
        resume(plan_in(folder), CONSOLE)


def change_rows(folder: Path) -> None:
    rewrite(folder / "in" / "a.parquet", lambda table: table.slice(1))


def damage(folder: Path) -> None:
    path = folder / "in" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (change_rows, {}, "/in/a.parquet as a-00000-of-00002.parquet; the file has changed since, or this run has another"),
        (damage, {}, "/in/a.parquet as a-00000-of-00002.parquet; the file has changed since"),
        (None, {"max_rows_per_file": 10}, "or this run has another --max-rows-per-file or --input; give the same again"),
        (None, {"image_column": "second"}, "started with --image-column image, and this run has second; give the same"),
        (None, {"label_column": None}, "was started with --label-column label, and this run has None; give"),
        (None, {"probabilities": True}, "was started with --probabilities False, and this run has True; give"),
        (None, {"precision": "bf16"}, "was started with --precision fp32, and this run has bf16; give"),
        (None, {"sha256": "other"}, "was started with --model with SHA-256 abc, and this run has other; give"),
    ],
)
def test_predictions_are_never_mixed_with_those_of_another_request(
    folder: Path, change: Callable[[Path], None] | None, settings: dict[str, Any], said: str
) -> None:
    write_all(plan_in(folder))
    if change:
        change(folder)
    before = names(folder / "out")
    with pytest.raises(RequestError, match=f"{re.escape(said)}.*--overwrite scores everything again"):
        resume(plan_in(folder, **settings), CONSOLE)
    assert names(folder / "out") == before


def finish(plan: Plan) -> None:
    """Score and publish as the driver does, in this process."""
    output, todo = resume(plan, CONSOLE)
    write_all(replace(plan, parts=todo))
    output = OutputFiles.read(plan, CONSOLE)
    files = reconcile(plan, output.stamps)
    line = result_line(plan, files, output.counts, 0, 1.0) | {"seconds": 1.0}
    check_strict(plan, output.counts, line)
    publish.publish(plan, output, files, line, CONSOLE)


class Stopped(FolderLock):
    """The lock of a run that is stopped after `left` changes of files."""

    left: int

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RunError("stopped")


OTHERS = (".git/config", "predictions/.DS_Store")


@pytest.mark.parametrize("same", [True, False], ids=["the same request", "another request"])
def test_overwrite_is_killed_at_every_change(folder: Path, *, same: bool) -> None:
    """The same command then gives the files of an undisturbed run, and those of others stay."""
    before = plan_in(folder) if same else plan_in(folder, max_rows_per_file=10, number_column="second")
    finish(before)
    earlier = folder / "earlier"
    (folder / "out").rename(earlier)
    finish(plan_in(folder))
    timed = {"manifest.json", "report.html"}
    alone = {name: (folder / "out" / name).read_bytes() for name in names(folder / "out") - timed}
    plan, killed, changes = plan_in(folder, overwrite=True), True, 0
    while killed:
        shutil.rmtree(folder / "out")
        shutil.copytree(earlier, folder / "out")
        fill(folder / "out", *OTHERS)
        lock = Stopped(plan.output, "")
        lock.left = changes
        try:
            finish(replace(plan, held=OutputFolder(plan.output, lock)))
            killed = False
        except RunError:
            assert (folder / "out" / MANIFEST).exists() == (changes == 0)
        finish(plan)
        assert names(folder / "out") == {*alone, *timed, *OTHERS}
        assert {name: (folder / "out" / name).read_bytes() for name in alone} == alone
        changes += 1
    assert changes > 10


def test_overwrite_goes_on_where_it_was_killed_and_begins_anew_where_it_was_not(folder: Path) -> None:
    plan = plan_in(folder, overwrite=True)
    finish(plan)
    (folder / "out" / MANIFEST).unlink()
    part(folder).unlink()
    assert resume(plan, CONSOLE)[1]["output"].to_pylist() == ["a-00001-of-00002.parquet"]
    finish(plan)
    before = names(folder / "out")
    with pytest.raises(RequestError, match="--overwrite: nothing was deleted, since no file of"):
        resume(replace(plan, parts=plan.parts.slice(0, 0)), CONSOLE)
    assert names(folder / "out") == before
    assert resume(plan, CONSOLE)[1].num_rows == 3


def test_strict_ends_without_a_manifest_and_the_run_without_it_scores_nothing(folder: Path) -> None:
    finish(plan_in(folder))
    message = "--strict: 1 row and 2 files cannot be used.*broken.parquet: is empty.*a.parquet: row 30: the number is 77"
    with pytest.raises(RunError, match=message):
        finish(plan_in(folder, strict=True))
    assert names(folder / "out") == {*PARTS, REJECTED}
    assert resume(plan_in(folder), CONSOLE)[1].num_rows == 0
    for name in ("a", "broken", "other"):
        (folder / "in" / f"{name}.parquet").unlink()
    finish(plan_in(folder, strict=True))
    assert (folder / "out" / MANIFEST).exists()
