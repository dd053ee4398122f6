"""The output folder: lost and repeated rows are found, unfinished files are deleted, and staged files are published in order."""

import io
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import ExistingFileError, RequestError, RowCountError, RunError
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring import publish
from mnistsum_ray.scoring.counts import encode_image
from mnistsum_ray.scoring.output import LIST, MANIFEST, OutputFiles, check_folders, follow_output, reconcile, resume
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.publish import move_listed, publish_staged, result_line
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.lock import FolderLock, folder_lock
from mnistsum_ray.storage.paths import locate
from tests.scoring.conftest import CONSOLE, plan_of, request_of, write_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 40 rows, of which row 30 is bad, and of 7 rows; and one that cannot be used."""
    (tmp_path / "in").mkdir()
    for name, rows in (("a", 40), ("b", 7)):
        numbers = [77 if row == 30 else 1 for row in range(rows)]
        second = [77 if row == 35 else 1 for row in range(rows)]
        table = pa.table({"image": [bytes(784)] * rows, "number": numbers, "second": second, "label": [1] * rows})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet", row_group_size=10)
    (tmp_path / "in" / "broken.parquet").touch()
    return tmp_path


def plan_in(folder: Path, *more: Path, **settings: Any) -> Plan:
    return plan_of(folder / "in", folder / "out", *more, **{"max_rows_per_file": 20, "label_column": "label"} | settings)


def output_of(plan: Plan) -> OutputFiles:
    return OutputFiles.read(plan.output, plan, CONSOLE)


def test_all_rows_there(folder: Path) -> None:
    plan = plan_in(folder)
    write_all(plan)
    output = output_of(plan)
    files, counts = reconcile(plan, output.stamps), output.counts
    broken = "is empty (0 bytes); write it again"
    assert [list(row.values()) for row in files.to_pylist()] == [
        ["a.parquet", 40, 39, 1, "scored", None],
        ["b.parquet", 7, 7, 0, "scored", None],
        ["broken.parquet", None, 0, 0, "failed", broken],
    ]
    line = result_line(plan, files, counts, 0, 2.0)
    names = ("input_rows", "scored_rows", "rejected_rows", "files", "failed_files", "rows_per_second", "digit_accuracy")
    assert [line[name] for name in names] == [47, 46, 1, 3, 1, 23.5, 5 / 46]
    ((reason, count),) = counts.reasons.items()
    assert (count, counts.examples) == (1, {reason: [["a.parquet", 30]]})
    assert counts.digits == [4, *[5] * 6, 4, 4, 4]
    assert counts.numbers == [0, 46, *[0] * 8]
    assert counts.probabilities == {name: [0] * 10 + [46] + [0] * 9 for name in PREDICTION_FIELDS.names if name.endswith("_prob")}
    assert counts.unsure == [[0.5, "a.parquet", 0, 0, 1, 1, encode_image(np.zeros((28, 28), np.uint8))]], "the same image once"
    assert counts.confusion == [[0] * 10, counts.digits, *[[0] * 10] * 8], "all labels are 1"


def part(folder: Path, of: str = "predictions") -> Path:
    return folder / "out" / of / "a-00001-of-00002.parquet"


def put_rejected_rows_of_another_column(folder: Path) -> None:
    """As an `--overwrite` with another number column that is killed after it has moved a file of rejected rows: row 30 is in
    neither file, and row 35 in both."""
    plan = plan_of(folder / "in", folder / "other", max_rows_per_file=20, label_column="label", number_column="second")
    write_all(plan)
    shutil.copy(folder / "other" / REJECTED, folder / "out" / REJECTED)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


@pytest.mark.parametrize(
    ("damage", "there"),
    [
        (lambda folder: rewrite(part(folder), lambda table: table.slice(1)), "18 predictions and 1 rejected rows"),
        (
            lambda folder: rewrite(part(folder), lambda table: pa.concat_tables([table, table[18:]])),
            "20 predictions and 1 rejected",
        ),
        (lambda folder: rewrite(part(folder, "rejected"), lambda table: table.slice(1)), "19 predictions and 0 rejected rows"),
        (put_rejected_rows_of_another_column, "19 predictions and 0 rejected rows of 20 rows"),
        (lambda folder: part(folder).unlink(), None),
        (lambda folder: shutil.copy(part(folder).with_name("a-00000-of-00002.parquet"), part(folder)), None),
        (lambda folder: shutil.copy(part(folder).with_name("b.parquet"), part(folder)), None),
    ],
    ids=["missing", "twice", "rejected missing", "rejected of another column", "no file", "other rows", "other file"],
)
def test_a_part_that_differs_from_the_plan_is_named(folder: Path, damage: Callable[[Path], object], there: str | None) -> None:
    plan = plan_in(folder)
    write_all(plan)
    damage(folder)
    with pytest.raises(RowCountError, match=r"a\.parquet: rows 20 to 39 should be in predictions/a-00001-of-00002.parquet, and"):
        reconcile(plan, output_of(plan).stamps)
    if there:
        with pytest.raises(RequestError, match=f"predictions/a-00001-of-00002.parquet has {there}.*; move it away"):
            resume(plan, CONSOLE)


def test_a_file_whose_parts_lack_rows_is_named(folder: Path) -> None:
    plan = plan_in(folder)
    write_all(plan)
    plan = replace(plan, parts=plan.parts.slice(1))
    with pytest.raises(RowCountError, match=r"a\.parquet: has 40 rows, of which 20 are accounted for"):
        reconcile(plan, output_of(plan).stamps)


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
    unfinished = (".mnistsum-0123456789abcdef.partial", "predictions/b/.mnistsum-0123456789abcdef.partial")
    hidden = (".mnistsum-notes.partial", "b/.download.partial", "predictions/.ipynb_checkpoints/a.parquet", "_SUCCESS", "_x/y")
    fill(folder / "out", *unfinished, *hidden)
    (folder / "in" / "b.parquet").unlink()
    said = io.StringIO()
    _, _, todo = resume(plan_in(folder), Console(said))
    assert names(folder / "out") == PARTS - {"predictions/a-00001-of-00002.parquet"} | {*hidden}
    assert todo["output"].to_pylist() == ["a-00001-of-00002.parquet"]
    assert "left as they are: 1 output files of input that is not there now, such as" in said.getvalue()


@pytest.mark.parametrize("other", ["thesis.tex.partial", "predictions/c.parquet", "rejected/notes.txt"])
def test_a_file_of_others_is_refused_before_anything_is_deleted(folder: Path, other: str) -> None:
    write_all(plan_in(folder))
    fill(folder / "out", other, ".mnistsum-0123456789abcdef.partial")
    before = names(folder / "out")
    with pytest.raises(RequestError, match=f"{other} .*move it away"):
        resume(plan_in(folder, overwrite=True), CONSOLE)
    assert names(folder / "out") == before


def test_a_file_of_others_with_the_name_of_one_of_ours_is_refused(folder: Path) -> None:
    fill(folder / "out", "manifest.json")
    with pytest.raises(RequestError, match=r"manifest\.json is not a file of this program; move it away"):
        resume(plan_in(folder), CONSOLE)


def change_rows(folder: Path) -> None:
    rewrite(folder / "in" / "a.parquet", lambda table: table.slice(1))


def damage(folder: Path) -> None:
    path = folder / "in" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def move_away(folder: Path) -> None:
    change_rows(folder)
    (folder / "in").rename(folder / "elsewhere")
    (folder / "in").symlink_to(folder / "elsewhere")


GIVE = "give the same again, or --overwrite scores everything again"


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (change_rows, {}, "a.parquet has changed since it was scored; --overwrite scores everything again"),
        (move_away, {}, "in/a.parquet as a-00000-of-00002.parquet; choose another folder, or --overwrite scores"),
        (damage, {}, "holds predictions of a.parquet, which now cannot be used (is not Parquet, or was cut off"),
        (None, {"image_column": "second"}, "holds predictions of a.parquet, which now cannot be used (column 'second' has type"),
        (None, {"label_column": None}, f"was started with --label-column label, and this run has no --label-column; {GIVE}"),
        (
            None,
            {"number_column": "second"},
            "was started with --number-column number, and this run has --number-column second; give",
        ),
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
    with pytest.raises(RequestError) as refused:
        resume(plan_in(folder, **settings), CONSOLE)
    assert said in str(refused.value)
    assert names(folder / "out") == before


@pytest.mark.parametrize("settings", [{}, {"image_column": "second"}], ids=str)
def test_overwrite_keeps_predictions_that_cannot_be_made_again(folder: Path, settings: dict[str, Any]) -> None:
    """The input folder may have another common folder now, so that the file has another name."""
    write_all(plan_in(folder))
    (folder / "more").mkdir()
    shutil.copy(folder / "in" / "b.parquet", folder / "more")
    if not settings:
        damage(folder)
    with pytest.raises(
        RunError, match=r"--overwrite: nothing was replaced: in/a\.parquet cannot be used, and the output holds its"
    ):
        resume(plan_in(folder, folder / "more", overwrite=True, **settings), CONSOLE)


def test_an_output_goes_on_with_the_flags_that_it_was_begun_with(folder: Path) -> None:
    def begun(**settings: Any) -> list[Any]:
        config = follow_output(request_of(folder / "in", folder / "out", **settings), CONSOLE).config
        return [config.precision, config.max_rows_per_file]

    (folder / "in" / "broken.parquet").unlink()  # --strict refuses it
    assert begun() == [None, None]
    write_all(plan_in(folder, precision="bf16"))
    assert begun(precision="fp32", max_rows_per_file=30) == ["fp32", 30]
    staged = plan_in(folder, strict=True, precision="fp32", max_rows_per_file=30)
    write_all(staged)
    assert (begun(), begun(strict=True)) == (["bf16", 20], ["bf16", 20]), "what is published counts"
    shutil.rmtree(folder / "out" / "predictions")
    assert begun(strict=True) == ["fp32", 30]
    write_all(plan_in(folder, precision="bf16"))
    assert begun() == ["bf16", 20]
    assert begun(sha256="other") == [None, None]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("_unpublished", "link"), ("predictions", "broken link"), ("rejected", "file"), ("predictions/deep", "link")],
)
def test_a_link_or_a_file_with_the_name_of_a_folder_of_ours_is_refused(folder: Path, name: str, kind: str) -> None:
    fill(folder, "victim/data.parquet", "out/_lock")
    path = folder / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.touch() if kind == "file" else path.symlink_to(folder / ("victim" if kind == "link" else "nowhere"))
    with pytest.raises(RequestError, match=f"{name} is not a folder of this program, but a link or a file; remove it"):
        check_folders(plan_in(folder).output)
    assert names(folder / "victim") == {"data.parquet"}


def test_staged_files_of_another_request_are_deleted_and_those_of_this_one_resumed(folder: Path) -> None:
    write_all(plan_in(folder, overwrite=True))
    staging = folder / "out" / "_unpublished"
    rewrite(folder / "in" / "b.parquet", lambda table: table.slice(1))
    _, _, todo = resume(plan_in(folder, overwrite=True), CONSOLE)
    assert names(staging) == PARTS - {"predictions/b.parquet"} | {REJECTED}
    assert todo["output"].to_pylist() == ["b.parquet"]


OTHERS = (".git/config", "predictions/.DS_Store", "came-meanwhile.parquet")


def replacement(folder: Path) -> tuple[Plan, OutputFiles]:
    """Write an output with another number column and smaller files, and stage what shall replace it."""
    write_all(plan_of(folder / "in", folder / "out", max_rows_per_file=10, number_column="second"))
    plan = plan_in(folder, overwrite=True)
    published = output_of(plan)
    write_all(plan)
    fill(folder / "out", "files.parquet", "manifest.json")
    return plan, published


def test_replacing_keeps_the_files_of_others(folder: Path) -> None:
    plan, published = replacement(folder)
    fill(folder / "out", *OTHERS)
    publish_staged(plan, published, CONSOLE)
    assert names(folder / "out") == {*PARTS, REJECTED, f"_unpublished/{LIST}", *OTHERS}, "the manifest comes after this"


class Stopped(FolderLock):
    """The lock of a run that is stopped after `left` changes of files."""

    left: int

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RunError("another run has taken the output")


@pytest.mark.parametrize("changes", range(9))
def test_after_a_kill_while_files_are_moved_the_next_run_scores_nothing(folder: Path, changes: int) -> None:
    """The list, the manifest, the files about the run at once, four moves and the deletions at once are eight changes."""
    plan, published = replacement(folder)
    lock = Stopped(plan.output, "")
    lock.left = changes
    with pytest.raises(RunError, match="another run") if changes < 8 else nullcontext():
        publish_staged(replace(plan, held=OutputFolder(plan.output, lock)), published, CONSOLE)
    there = names(folder / "out")
    assert (f"_unpublished/{LIST}" in there, "manifest.json" in there) == (changes > 0, changes < 2)
    assert "predictions/b.parquet" in there, "the earlier file or the new one"
    assert move_listed(plan.held, CONSOLE) == (changes > 0)
    plan, _, todo = resume(plan, CONSOLE)
    assert (todo.num_rows, plan.overwrite) == (0, changes == 0)
    if changes:
        output = output_of(plan)
        reconcile(plan, output.stamps)
        assert output.counts.labelled == 46


def test_another_overwrite_after_such_a_kill_begins_anew(folder: Path) -> None:
    plan, published = replacement(folder)
    publish_staged(plan, published, CONSOLE)
    other, _, todo = resume(plan_in(folder, overwrite=True, number_column="second"), CONSOLE)
    assert (other.overwrite, todo.num_rows) == (True, 3)
    assert names(folder / "out") == {*PARTS, REJECTED}, "the list does not tell what is staged from now on"


def test_a_list_leads_to_no_file_outside(folder: Path) -> None:
    plan, _ = replacement(folder)
    outside = ["predictions/../../victim", "../victim", "../in/b.parquet", ".git/config"]
    fill(folder, "victim", "out/victim", "out/.git/config")
    listed = folder / "out" / "_unpublished" / LIST
    pq.write_table(pa.table({"file": outside}), listed)
    assert move_listed(plan.held, CONSOLE)
    assert names(folder) >= {"victim", "out/victim", "in/b.parquet", "out/.git/config"}
    pq.write_table(pa.table({"name": outside}), listed)
    with pytest.raises(RequestError, match=rf"_unpublished/{LIST} is not a file of this program; remove _unpublished"):
        move_listed(plan.held, CONSOLE)


def test_a_list_whose_files_are_moved_leaves_a_finished_output_as_it_is(folder: Path) -> None:
    """A run is killed after its manifest, and the next command is refused."""
    plan, published = replacement(folder)
    publish_staged(plan, published, CONSOLE)
    fill(folder / "out", "files.parquet", "manifest.json")
    before = names(folder / "out")
    assert move_listed(plan.held, CONSOLE)
    with pytest.raises(RequestError, match="another model"):
        resume(plan_in(folder, sha256="other"), CONSOLE)
    assert names(folder / "out") == before


@pytest.mark.parametrize("settings", [{}, {"overwrite": True}], ids=str)
def test_no_name_is_that_of_a_file_and_of_a_folder(folder: Path, settings: dict[str, bool]) -> None:
    name = folder / "in" / "days.parquet"
    name.mkdir()
    shutil.copy(folder / "in" / "b.parquet", name / "c.parquet")
    write_all(plan_in(folder))
    before = names(folder / "out")
    shutil.rmtree(name)
    shutil.copy(folder / "in" / "b.parquet", name)
    with pytest.raises(RequestError, match=r"days\.parquet would be a file and a folder; choose another folder"):
        resume(plan_in(folder, **settings), CONSOLE)
    assert names(folder / "out") == before


def finish(plan: Plan) -> None:
    """Score and publish as the driver does, in this process."""
    plan, _, todo = resume(plan, CONSOLE)
    write_all(replace(plan, parts=todo))
    output = output_of(plan)
    files = reconcile(plan, output.stamps)
    publish.publish(plan, output, files, result_line(plan, files, output.counts, 0, 1.0) | {"seconds": 1.0}, Console())


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


def test_a_manifest_that_another_run_has_written_is_not_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raced(OutputFolder):
        def delete(self, name: str) -> None:
            super().delete(name)
            if name == MANIFEST:  # another run finishes at this moment
                (folder / "out" / MANIFEST).write_text("of the other run")

    monkeypatch.setattr(publish, "draw_pictures", lambda *_: {})  # takes seconds
    plan = plan_in(folder)
    with pytest.raises(ExistingFileError, match=r"manifest\.json: exists"):
        finish(replace(plan, held=Raced(plan.output, None)))
    assert (folder / "out" / MANIFEST).read_text() == "of the other run"
