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

from mnistsum_ray.errors import ExistingFileError, RequestError, RowCountError, RunError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring import publish
from mnistsum_ray.scoring.output import MANIFEST, OutputFiles, check_folders, follow_output, reconcile, resume
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.publish import check_strict, result_line
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.lock import FolderLock, folder_lock
from mnistsum_ray.storage.paths import locate
from tests.scoring.conftest import CONSOLE, plan_of, request_of, write_all


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


def plan_in(folder: Path, *more: Path, **settings: Any) -> Plan:
    return plan_of(folder / "in", folder / "out", *more, **{"max_rows_per_file": 20, "label_column": "label"} | settings)


def output_of(plan: Plan) -> OutputFiles:
    return OutputFiles.read(plan, CONSOLE)


def test_all_rows_are_counted(folder: Path) -> None:
    plan = plan_in(folder)
    write_all(plan)
    output = output_of(plan)
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
        (
            lambda folder: rewrite(part(folder), lambda table: pa.concat_tables([table, table[18:]])),
            "20 predictions and 1 rejected",
        ),
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
        reconcile(plan, output_of(plan).stamps)
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
    shutil.copy(part(folder, "rejected"), folder / "out" / "rejected" / "b.parquet")  # of another run, and b has none
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


GIVE = "give the same again, or --overwrite scores everything again"


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (change_rows, {}, "a.parquet has changed since it was scored; --overwrite scores everything again"),
        (damage, {}, "holds predictions of a.parquet, which now cannot be used (is not Parquet, or was cut off"),
        (None, {"image_column": "second"}, "holds predictions of a.parquet, which now cannot be used (column 'second' has type"),
        (None, {"label_column": None}, f"was started with --label-column label, and this run has no --label-column; {GIVE}"),
        (None, {"probabilities": True}, f"was started with no --probabilities, and this run has --probabilities; {GIVE}"),
        (None, {"precision": "bf16"}, f"was started with --precision fp32, and this run has --precision bf16; {GIVE}"),
        (None, {"max_rows_per_file": 10}, f"since it was started with another --max-rows-per-file or --input; {GIVE}"),
        (None, {"sha256": "other"}, "holds predictions of another model (SHA-256 abc…, --model has other…); --overwrite"),
    ],
)
def test_predictions_are_never_mixed_with_those_of_another_request(
    folder: Path, change: Callable[[Path], None] | None, settings: dict[str, Any], said: str
) -> None:
    write_all(plan_in(folder))
    if change:
        change(folder)
    before = names(folder / "out")
    with pytest.raises(RequestError, match=re.escape(said)):
        resume(plan_in(folder, **settings), CONSOLE)
    assert names(folder / "out") == before


def test_an_output_goes_on_with_the_flags_that_it_was_begun_with(folder: Path) -> None:
    def begun(**settings: Any) -> list[Any]:
        config = follow_output(request_of(folder / "in", folder / "out", **settings), CONSOLE).config
        return [config.precision, config.max_rows_per_file]

    assert begun() == [None, None]
    write_all(plan_in(folder, precision="bf16"))
    assert begun() == ["bf16", 20]
    assert begun(precision="fp32", max_rows_per_file=30) == ["fp32", 30]
    assert begun(sha256="other") == [None, None]


@pytest.mark.parametrize(("name", "kind"), [("predictions", "broken link"), ("rejected", "file"), ("predictions/deep", "link")])
def test_a_link_or_a_file_with_the_name_of_a_folder_of_ours_is_refused(folder: Path, name: str, kind: str) -> None:
    fill(folder, "victim/data.parquet", "out/_lock")
    path = folder / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.touch() if kind == "file" else path.symlink_to(folder / ("victim" if kind == "link" else "nowhere"))
    with pytest.raises(RequestError, match=f"{name} is not a folder of this program, but a link or a file; remove it"):
        check_folders(plan_in(folder).output)
    assert names(folder / "victim") == {"data.parquet"}


def finish(plan: Plan) -> None:
    """Score and publish as the driver does, in this process."""
    output, todo = resume(plan, CONSOLE)
    write_all(replace(plan, parts=todo))
    output = output_of(plan)
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
    assert resume(plan, CONSOLE)[1].num_rows == 3


def test_overwrite_deletes_nothing_where_all_of_the_input_is_unusable(folder: Path) -> None:
    write_all(plan_in(folder))
    before = names(folder / "out")
    for name in ("a", "b", "other"):
        (folder / "in" / f"{name}.parquet").write_bytes(b"no")
    with pytest.raises(RequestError, match="--overwrite: nothing was deleted, since no file of"):
        resume(plan_in(folder, overwrite=True), CONSOLE)
    assert names(folder / "out") == before


def test_strict_ends_without_a_manifest_and_the_run_without_it_scores_nothing(folder: Path) -> None:
    finish(plan_in(folder))
    (folder / "in" / "c.parquet").write_bytes(b"no")
    with pytest.raises(RunError) as refused:
        finish(plan_in(folder, strict=True))
    said = str(refused.value)
    assert said.startswith(
        "--strict: 1 row and 3 files cannot be used, so there is no manifest.json; the same command "
        "without --strict finishes at once: broken.parquet: is empty (0 bytes); write it again | c.pa"
    )
    assert "a.parquet: row 30: the number is 77" in said
    assert said.endswith(f"; all: {folder}/out/rejected")
    assert names(folder / "out") == {*PARTS, REJECTED}
    assert resume(plan_in(folder), CONSOLE)[1].num_rows == 0
    for name in ("a", "broken", "other", "c"):
        (folder / "in" / f"{name}.parquet").unlink()
    finish(plan_in(folder, strict=True))
    assert (folder / "out" / MANIFEST).exists()


def test_a_run_that_was_suspended_while_it_drew_writes_nothing_over_the_next_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suspended(*_: Any) -> dict[str, Any]:
        (folder / "out" / "_lock").write_text('{"id": "the next run"}')
        assert held.lock
        held.lock._checked = float("-inf")  # the clock advances while a process is suspended
        return {}

    monkeypatch.setattr(publish, "draw_pictures", suspended)
    with (
        folder_lock(locate(str(folder / "out"), "--output"), "--output", print) as held,
        pytest.raises(RunError, match=r"another run has taken the output \(the next run\)"),
    ):
        finish(replace(plan_in(folder), held=held))
    assert not {"manifest.json", "report.html"} & names(folder / "out")


def test_a_manifest_that_another_run_has_written_is_not_replaced(folder: Path) -> None:
    class Raced(OutputFolder):
        def delete(self, name: str) -> None:
            super().delete(name)
            if name == MANIFEST:  # another run finishes at this moment
                (folder / "out" / MANIFEST).write_text("of the other run")

    plan = plan_in(folder)
    with pytest.raises(ExistingFileError, match=r"manifest\.json: exists"):
        finish(replace(plan, held=Raced(plan.output, None)))
    assert (folder / "out" / MANIFEST).read_text() == "of the other run"
