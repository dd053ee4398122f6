"""Output and staging folders: unfinished files are deleted, and a new output replaces the old one without a gap."""

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.output_folder import clear_unfinished, list_output, unfinished_rejects
from mnistsum_ray.scoring.staging import publish_staged, staging_folder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import output_lock
from mnistsum_ray.storage.paths import locate


def fill(folder: Path, *names: str) -> Location:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")
    return locate(str(folder), "--output")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


PROVENANCE = {b"mnistsum_ray.score": b"{}"}


def predictions(folder: Path, *names: str) -> None:
    """Write files that have provenance."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [f"{folder.name} {name}"]}).replace_schema_metadata(PROVENANCE), folder / name)


def test_unfinished_files_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    done = ("predictions/a.parquet", "rejected/a.parquet", "predictions/b/c.parquet", "files.parquet", "manifest.json")
    unfinished = (".mnistsum-0123456789abcdef.partial", "predictions/b/.mnistsum-0123456789abcdef.partial", "rejected/d.parquet")
    others = ("thesis.tex.partial", ".mnistsum-notes.partial", "b/.download.partial")
    output = fill(tmp_path / "out", *done, *unfinished, *others)
    listing = list_output(output)
    clear_unfinished(output, listing)
    assert names(tmp_path / "out") == {*done, *others}
    assert set(listing.predictions["name"].to_pylist()) == {"a.parquet", "b/c.parquet"}
    assert set(listing.others) == {"thesis.tex.partial"}
    assert unfinished_rejects(listing) == {"d.parquet"}


@pytest.mark.parametrize("name", [".out.unpublished", ".out.unpublished.old", "file"])
def test_a_link_with_the_name_of_the_staging_folder_is_refused(tmp_path: Path, name: str) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet")
    victim = fill(tmp_path / "victim", "data.parquet", "sub/data.parquet")
    if name == "file":
        (tmp_path / ".out.unpublished").write_text("")
    else:
        (tmp_path / name).symlink_to(victim.path)
    with pytest.raises(
        RequestError, match=r"\.out\.unpublished.* is not a folder of this program, but a link or a file; remove it"
    ):
        staging_folder(output)
    assert names(tmp_path / "victim") == {"data.parquet", "sub/data.parquet"}


def test_replacing_keeps_permissions_and_files_of_others(tmp_path: Path) -> None:
    predictions(tmp_path / "out", "predictions/a.parquet", "predictions/deep/b.parquet", "rejected/a.parquet")
    output = fill(tmp_path / "out", ".git/config", "predictions/deep/.DS_Store", "manifest.json")
    (tmp_path / "out" / "link").symlink_to(fill(tmp_path / "elsewhere", "x").path)
    (tmp_path / "out").chmod(0o2750)
    (tmp_path / "out" / "predictions" / "deep").chmod(0o700)
    staging = staging_folder(output)
    predictions(Path(staging.path), "predictions/a.parquet", "predictions/deep/c.parquet")
    fill(tmp_path / "out", "came-meanwhile.parquet")
    publish_staged(staging, output, lambda: None, replace=True, replaced={"a.parquet", "deep/b.parquet"})
    kept = {".git/config", "predictions/deep/.DS_Store", "came-meanwhile.parquet"}
    assert names(tmp_path / "out") == {"predictions/a.parquet", "predictions/deep/c.parquet", *kept}
    assert (tmp_path / "out" / "link").is_symlink()
    assert names(tmp_path / "elsewhere") == {"x"}
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o2750
    assert (tmp_path / "out" / "predictions" / "deep").stat().st_mode & 0o7777 == 0o700
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_a_replaced_output_that_a_killed_run_left_is_deleted_but_for_files_of_others(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet")
    predictions(tmp_path / ".out.unpublished.old", "predictions/a.parquet", "rejected/a.parquet", "predictions/b.parquet")
    fill(tmp_path / ".out.unpublished.old", "manifest.json", ".git/config", "thesis.parquet")
    staging_folder(output)
    assert names(tmp_path / "out") == {"predictions/a.parquet", ".git/config", "thesis.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_with_a_long_name_is_staged_inside(tmp_path: Path) -> None:
    output = fill(tmp_path / ("x" * 250), "predictions/a.parquet")
    assert staging_folder(output).path == f"{output.path}/_unpublished"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_replacing_leaves_no_moment_without_an_output(tmp_path: Path, in_one_step: bool) -> None:
    predictions(tmp_path / "out", "predictions/a.parquet", "predictions/old.parquet", "rejected/old.parquet")
    output = fill(tmp_path / "out", "files.parquet", "manifest.json")
    new = {"predictions/a.parquet", "predictions/new/b.parquet", "rejected/a.parquet", "files.parquet", "manifest.json"}
    staging = staging_folder(output) if in_one_step else output / "_unpublished"
    fill(Path(staging.path), *new)
    seen: set[bool] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add((tmp_path / "out" / "predictions" / "a.parquet").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    publish_staged(staging, output, lambda: None, replace=True, replaced={"a.parquet", "old.parquet"})
    ended.set()
    watcher.join()
    assert seen == {True}
    assert names(tmp_path / "out") == new
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "_unpublished").exists()
    assert (tmp_path / "out" / "predictions" / "a.parquet").read_text().startswith(Path(staging.path).name)


def test_publishing_without_replacing_keeps_the_old_files(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet", "manifest.json")
    staging = staging_folder(output)
    fill(Path(staging.path), "predictions/b.parquet", "manifest.json")
    publish_staged(staging, output, lambda: None, replace=False)
    assert names(tmp_path / "out") == {"predictions/a.parquet", "predictions/b.parquet", "manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_lock_that_a_killed_run_left_in_the_staging_folder_is_replaced(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet", "_lock")
    staging = staging_folder(output)
    fill(Path(staging.path), "predictions/b.parquet", "_lock")
    publish_staged(staging, output, lambda: None, replace=True, replaced={"a.parquet"})
    assert names(tmp_path / "out") == {"predictions/b.parquet", "_lock"}
    assert (tmp_path / "out" / "_lock").read_text() == "out _lock"


def test_publishing_without_hard_links_moves_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    output = fill(tmp_path / "out", "predictions/a.parquet", "_lock")
    staging = staging_folder(output)
    fill(Path(staging.path), "predictions/b.parquet")
    publish_staged(staging, output, lambda: None, replace=True, replaced={"a.parquet"})
    assert names(tmp_path / "out") == {"predictions/b.parquet", "_lock"}


def test_publishing_ends_when_another_run_takes_the_output(tmp_path: Path) -> None:
    """The lock is checked before each move, so at most the moves that had begun are made."""
    output = fill(tmp_path / "out", "predictions/old.parquet")
    staging = output / "_unpublished"
    fill(Path(staging.path), *(f"{number}.parquet" for number in range(100)))
    seen: list[None] = []

    def check() -> None:
        seen.append(None)
        if len(seen) > 10:
            raise OSError("another run has taken the output")

    with pytest.raises(OSError, match="another run"):
        publish_staged(staging, output, check, replace=False)
    moved = names(tmp_path / "out") - {f"_unpublished/{number}.parquet" for number in range(100)}
    assert 0 < len(moved) < 11
    assert "predictions/old.parquet" in moved


def test_a_file_of_others_with_the_name_of_the_lock_is_left_alone(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "_lock")
    with (
        pytest.raises(RequestError, match="_lock is not a file of this program; move it away"),
        output_lock(output, "--output", print),
    ):
        pass
    assert (tmp_path / "out" / "_lock").read_text() == "out _lock"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RequestError, match="cannot be written"),
        output_lock(locate(str(tmp_path / "file" / "out"), "--output"), "--output", print),
    ):
        pass
