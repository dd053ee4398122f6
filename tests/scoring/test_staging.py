"""Output and staging folders: unfinished files are deleted, and staged files are published in order."""

import threading
from pathlib import Path

import pytest

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.scoring.output import Target, clear_unfinished, list_output, open_target, publish_staged
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock, folder_lock
from mnistsum_ray.storage.paths import locate


class Held(FolderLock):
    """A lock that is lost after some checks."""

    def __init__(self, checks: int = 10**9) -> None:
        super().__init__(locate("/nowhere", "--output"), "")
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RunError("another run has taken the output")


def fill(folder: Path, *names: str) -> Location:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")
    return locate(str(folder), "--output")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def staged(output: Location, *files: str, overwrite: bool = False, checks: int = 10**9) -> Target:
    fill(Path(output.path, "_unpublished"), *files)
    config = ScoreConfig(model="m", input=("i",), output="o", strict=True, overwrite=overwrite)
    return open_target(config, output, Held(checks))


def test_unfinished_files_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    done = ("predictions/a.parquet", "rejected/a.parquet", "predictions/b/c.parquet", "files.parquet", "manifest.json")
    unfinished = (".mnistsum-0123456789abcdef.partial", "predictions/b/.mnistsum-0123456789abcdef.partial", "rejected/d.parquet")
    hidden = (".mnistsum-notes.partial", "b/.download.partial", "predictions/.ipynb_checkpoints/a.parquet", "_SUCCESS", "_x/y")
    output = fill(tmp_path / "out", *done, *unfinished, *hidden, "thesis.tex.partial")
    listing = list_output(output)
    clear_unfinished(output, listing)
    assert names(tmp_path / "out") == {*done, *hidden, "thesis.tex.partial"}
    assert set(listing.predictions["name"].to_pylist()) == {"a.parquet", "b/c.parquet"}
    assert set(listing.others) == {"thesis.tex.partial"}
    assert listing.unfinished_rejects == {"d.parquet"}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_with_the_name_of_the_staging_folder_is_refused(tmp_path: Path, kind: str) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet")
    victim = fill(tmp_path / "victim", "data.parquet", "sub/data.parquet")
    if kind == "file":
        (tmp_path / "out" / "_unpublished").write_text("")
    else:
        (tmp_path / "out" / "_unpublished").symlink_to(victim.path)
    config = ScoreConfig(model="m", input=("i",), output="o", strict=True)
    with pytest.raises(RequestError, match="_unpublished is not a folder of this program, but a link or a file; remove it"):
        open_target(config, output, Held())
    assert names(tmp_path / "victim") == {"data.parquet", "sub/data.parquet"}


def test_replacing_leaves_no_moment_without_a_file_and_keeps_those_of_others(tmp_path: Path) -> None:
    old = ("predictions/a.parquet", "predictions/old.parquet", "rejected/old.parquet", "files.parquet", "manifest.json")
    others = (".git/config", "predictions/.DS_Store", "came-meanwhile.parquet")
    output = fill(tmp_path / "out", *old, *others)
    new = {"predictions/a.parquet", "predictions/new/b.parquet", "rejected/a.parquet", "files.parquet", "manifest.json"}
    target = staged(output, *new, overwrite=True)
    seen: set[bool] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add((tmp_path / "out" / "predictions" / "a.parquet").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    publish_staged(target, ["a.parquet", "old.parquet"])
    ended.set()
    watcher.join()
    assert seen == {True}
    assert names(tmp_path / "out") == {*new, *others}
    assert not (tmp_path / "out" / "_unpublished").exists()
    assert (tmp_path / "out" / "predictions" / "a.parquet").read_text() == "_unpublished predictions/a.parquet"


def test_publishing_without_replacing_keeps_the_old_files(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "predictions/a.parquet", "manifest.json")
    publish_staged(staged(output, "predictions/b.parquet", "manifest.json"))
    assert names(tmp_path / "out") == {"predictions/a.parquet", "predictions/b.parquet", "manifest.json"}


def test_publishing_ends_when_another_run_takes_the_output(tmp_path: Path) -> None:
    """The lock is checked before each move, so at most the moves that had begun are made."""
    output = fill(tmp_path / "out", "predictions/old.parquet")
    files = [f"predictions/{number}.parquet" for number in range(100)]
    target = staged(output, *files, "manifest.json", checks=10)
    with pytest.raises(RunError, match="another run"):
        publish_staged(target)
    moved = {name for name in names(tmp_path / "out") if not name.startswith("_unpublished/")} - {"predictions/old.parquet"}
    assert 0 < len(moved) < 11
    assert "manifest.json" not in moved


def test_a_file_of_others_with_the_name_of_the_lock_is_left_alone(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "_lock")
    with (
        pytest.raises(RequestError, match="_lock is not a file of this program; move it away"),
        folder_lock(output, "--output", print),
    ):
        pass
    assert (tmp_path / "out" / "_lock").read_text() == "out _lock"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RequestError, match="cannot be written"),
        folder_lock(locate(str(tmp_path / "file" / "out"), "--output"), "--output", print),
    ):
        pass
