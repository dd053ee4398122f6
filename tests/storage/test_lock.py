"""One run at a time in a folder on a disk, whatever lies there and however a run ends."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.lock import output_lock
from mnistsum_ray.storage.lock_file import check_not_locked
from mnistsum_ray.storage.paths import locate

HOLD = """
import sys
from mnistsum_ray.storage.lock import output_lock
from mnistsum_ray.storage.paths import locate
with output_lock(locate(sys.argv[1], "--output"), "--output", print) as held:
    print(held.fence.holder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds the folder, and its id."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def lock(folder: Path) -> None:
    with output_lock(locate(str(folder), "--output"), "--output", print):
        pass


def check(folder: Path) -> None:
    check_not_locked(locate(str(folder), "--output"), "--output")


def test_a_second_run_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "out") as (_, holder):
        for use in (lock, check):
            with pytest.raises(RequestError) as refused:
                use(tmp_path / "out")
            expected = f"--output {tmp_path}/out: another run ({holder}) is writing there; wait for it, or choose another"
            assert str(refused.value) == expected
        assert holder in (tmp_path / "out" / "_lock").read_text(), "the holder's workers read its id there"


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "out") as (process, _):
        process.kill()
        process.wait()
    check(tmp_path / "out")
    assert (tmp_path / "out" / "_lock").exists()
    lock(tmp_path / "out")
    assert not (tmp_path / "out" / "_lock").exists()


def test_nothing_is_left_of_a_folder_that_was_created_only_for_the_lock(tmp_path: Path) -> None:
    lock(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    with output_lock(locate(str(tmp_path / "new" / "out"), "--output"), "--output", print):
        (tmp_path / "new" / "file").write_text("")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_check_changes_nothing(tmp_path: Path) -> None:
    check(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "_lock").write_text("notes")
    check(tmp_path)
    assert (tmp_path / "_lock").read_text() == "notes"


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "target").write_text("")
    (tmp_path / "out" / "_lock").symlink_to(tmp_path / "target")
    with pytest.raises(RequestError, match="cannot be written"):
        lock(tmp_path / "out")
    assert (tmp_path / "target").read_text() == ""
    (tmp_path / "target").unlink()
    with pytest.raises(RequestError, match="cannot be written"):
        lock(tmp_path / "out")
    assert not (tmp_path / "target").exists()


def test_a_lock_that_a_killed_run_left_under_two_names_is_taken(tmp_path: Path) -> None:
    """Publishing holds the output and its staging folder by hard links of one file; a kill leaves both."""
    for name in ("out", "staging"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "_lock").write_text('{"id": "killed"}')
    (tmp_path / "staging" / "_lock").hardlink_to(tmp_path / "out" / "_lock")
    lock(tmp_path / "out")
    assert not (tmp_path / "out" / "_lock").exists()
