"""Folders: what a killed run left is cleared away, and a new output takes the old one's place without a gap."""

import threading
from pathlib import Path

import pytest

from mnistsum_ray.config import Refusal
from mnistsum_ray.scoring import workspace
from mnistsum_ray.scoring.lock import hold
from mnistsum_ray.storage import Location, locate


def fill(folder: Path, *names: str) -> Location:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")
    return locate(str(folder), "--output")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    done = ("a.parquet", "_rejected/a.parquet", "b/c.parquet", "_files.parquet", "_manifest.json")
    unfinished = (".d.parquet.12ab.partial", "b/.e.parquet.34cd.partial", "_rejected/d.parquet", "_rejected/.x.5.partial")
    output = fill(tmp_path / "out", *done, *unfinished)
    listing = workspace.clean(output)
    assert names(tmp_path / "out") == set(done)
    assert listing.predictions["name"].to_pylist() == ["a.parquet", "b/c.parquet"]
    assert listing.rejected == {"a.parquet"}


@pytest.mark.parametrize("in_one_step", [True, False])
def test_replacing_leaves_no_moment_without_an_output(tmp_path: Path, in_one_step: bool) -> None:
    output = fill(tmp_path / "out", "a.parquet", "old.parquet", "_rejected/old.parquet", "_files.parquet", "_manifest.json")
    new = {"a.parquet", "new/b.parquet", "_rejected/a.parquet", "_files.parquet", "_manifest.json"}
    staging = workspace.staging_of(output) if in_one_step else output / "_unpublished"
    fill(Path(staging.path), *new)
    seen: set[bool] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.add((tmp_path / "out" / "a.parquet").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    workspace.publish(staging, output, replace=True)
    ended.set()
    watcher.join()
    assert seen == {True}
    assert names(tmp_path / "out") == new
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "_unpublished").exists()
    assert (tmp_path / "out" / "a.parquet").read_text() != "out a.parquet"


def test_publishing_beside_what_is_there_keeps_it(tmp_path: Path) -> None:
    output = fill(tmp_path / "out", "a.parquet", "_manifest.json")
    staging = workspace.staging_of(output)
    fill(Path(staging.path), "b.parquet", "_manifest.json")
    workspace.publish(staging, output, replace=False)
    assert names(tmp_path / "out") == {"a.parquet", "b.parquet", "_manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    output = locate(str(tmp_path / "out"), "--output")
    for _ in range(2):
        with hold(output, print) as still_held:
            still_held()
            with pytest.raises(Refusal, match="another run is writing there"), hold(output, print):
                pass
        assert names(tmp_path / "out") == set()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="cannot be written"), hold(locate(str(tmp_path / "file" / "out"), "--output"), print):
        pass
