"""How a job ends, without Ray: which signals stop it, what is said, and the exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnistsum_ray.cluster.reaper import Reaper
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.serialization import MODEL_FILES
from mnistsum_ray.storage.location import locate
from mnistsum_ray.training.checkpoints import latest_valid_checkpoint
from mnistsum_ray.training.state import STATE_CARD

_JOB = """
import atexit, signal, sys, time
from contextlib import contextmanager
from mnistsum_ray import cli
from mnistsum_ray.errors import RunError, RunInterrupted

@contextmanager
def slow():
    try:
        yield
    finally:
        time.sleep({cleanup})

class Slow:
    def __del__(self):
        print("ready", file=sys.stderr, flush=True)
        time.sleep(2)

def work(argv):
    with slow():
        try:
            {first}
            print("ready", file=sys.stderr, flush=True)
            time.sleep({work})
        except KeyboardInterrupt:
            raise {ends}("what is saved stays") from None
    return {{"done": True}}, 0

atexit.register(time.sleep, 1)
sys.exit(cli.run(work, []))
"""


def start(
    work: float = 30, cleanup: float = 0, ends: str = "RunInterrupted", first: str = "", before: Callable[[], object] | None = None
) -> subprocess.Popen[str]:
    """A job that works for so long, and takes so long to end after that; it is ready when this returns."""
    job = subprocess.Popen(
        [sys.executable, "-c", _JOB.format(work=work, cleanup=cleanup, ends=ends, first=first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    assert job.stderr is not None
    assert job.stderr.readline() == "ready\n"
    return job


def test_a_signal_that_is_ignored_stops_nothing() -> None:
    """`nohup` ignores SIGHUP, and a shell that runs a script SIGINT for what the script starts with `&`."""
    job = start(work=1.5, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    job.send_signal(signal.SIGHUP)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (0, '{"done": true}\n', "")


@pytest.mark.parametrize("pause", [0.3, 3.0])
def test_an_impatient_second_signal_changes_neither_the_line_nor_the_exit_code(pause: float) -> None:
    job = start(cleanup=5)
    job.send_signal(signal.SIGINT)
    time.sleep(pause)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (130, "", "stopped by SIGINT; what is saved stays\n")


def test_a_signal_that_comes_in_a_finalizer_stops_the_job_too() -> None:
    """Python prints an exception that is raised there, and goes on."""
    job = start(first="Slow()")
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (143, "")
    assert err in ("stopped by SIGTERM; what is saved stays\n", "ready\nstopped by SIGTERM; what is saved stays\n")


def test_a_job_that_fails_while_it_is_stopped_says_why() -> None:
    job = start(cleanup=7, ends="RunError")  # the interrupt is raised once more meanwhile
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (1, "", "error: what is saved stays\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_result_changes_nothing(number: signal.Signals) -> None:
    job = start(work=0)
    assert job.stdout is not None
    assert job.stdout.readline() == '{"done": true}\n'
    job.send_signal(number)
    _, err = job.communicate(timeout=30)
    assert (job.returncode, err) == (0, "")


def test_a_reaper_that_has_died_keeps_nothing_from_starting() -> None:
    reaper = Reaper()
    reaper._process.kill()
    reaper._process.wait()
    assert subprocess.run(["true"], preexec_fn=reaper.tell_from_child, check=False).returncode == 0
    reaper.end()


def test_what_a_killed_job_has_started_is_ended_whatever_it_calls_itself() -> None:
    code = (
        "import subprocess; from mnistsum_ray.cluster.reaper import Reaper; reaper = Reaper(); "
        "child = subprocess.Popen(['sleep', '100'], start_new_session=True, preexec_fn=reaper.tell_from_child); "
        "print(child.pid, flush=True); input()"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    child = int(job.stdout.readline())
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 15
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_that_no_checkpoint_is_left_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    assert latest_valid_checkpoint(locate(str(tmp_path), "--name"), said.append) is None
    assert said == ["no checkpoint is left, so the run begins anew"]


def test_a_checkpoint_of_another_version_is_refused_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "epoch_00029"
    folder.mkdir()
    for name in MODEL_FILES:
        (folder / name).write_text("{}")
    (folder / STATE_CARD).write_text('{"format": "mnistsum_ray.trainer/99"}')
    with pytest.raises(RequestError, match=r"epoch_00029 cannot be used: it was written by another version"):
        latest_valid_checkpoint(locate(str(tmp_path), "--name"), print)
    assert folder.exists()
