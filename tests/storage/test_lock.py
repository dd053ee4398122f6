"""One run at a time in a folder on a disk, whatever lies there and however a run ends."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mnistsum_ray.errors import RequestError, RunError, TryAgainError
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable

HOLD = """
import sys
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.paths import locate
with folder_lock(locate(sys.argv[1], "--output"), "--output", print) as held:
    print(held.lock.holder, flush=True)
    sys.stdin.read()
"""


def lock(folder: Path) -> None:
    with folder_lock(locate(str(folder), "--output"), "--output", print):
        pass


def test_a_second_run_is_refused_until_the_process_of_the_first_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        holder = process.stdout.readline().strip()
        with pytest.raises(TryAgainError) as refused:
            lock(out)
        assert f"--output {out}: another run ({holder}) is writing there" in str(refused.value)
    finally:
        process.kill()
        process.communicate()
    lock(out)


def test_a_folder_that_cannot_be_held_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--output /proc/out: cannot be written"):
        lock(Path("/proc/out"))
    (tmp_path / "_lock").write_text("notes")
    with pytest.raises(RequestError, match="_lock is not a file of this program; move it away"):
        lock(tmp_path)
    assert (tmp_path / "_lock").read_text() == "notes"


def test_a_run_notices_that_another_has_taken_the_folder(tmp_path: Path) -> None:
    place = locate(str(tmp_path / "out"), "--output")
    with folder_lock(place, "--output", print) as held:
        there = pickle.loads(pickle.dumps(held))
        held.check()
        writable(place).write("_lock", {"id": "another"})
        for side in (held, there):
            assert side.lock
            side.lock._checked = 0.0
            with pytest.raises(RunError, match=r"another run has taken the output \(another\); this run stops"):
                side.check()
