"""A job stopped at any moment exits with 128 + signal, leaves no process behind, and can be continued to the same bits."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Job, run_job
from tests.integration.test_kills import left
from tests.integration.test_score_kills import content, flags, pairs, undisturbed

__all__ = ["pairs", "undisturbed"]  # fixtures

EVERY = 5

MOMENTS = 10
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

pytestmark = pytest.mark.slow


def stop(job: Job, after: float, number: signal.Signals) -> int:
    """Send a signal to the job after these seconds. Check its last line and that no process is left; return the exit code."""
    time.sleep(after)
    os.killpg(job.process.pid, number)
    done = job.wait(timeout=60)
    job.check_nothing_left()
    if done.code == 128 + number:
        assert done.err.splitlines()[-1].startswith(f"stopped by {number.name}; "), done.err
        assert done.err.count("stopped by") == 1
    assert "Traceback" not in done.err
    return done.code


@pytest.mark.sweep
def test_training_stopped_at_ten_moments(tmp_path: Path, data: Path) -> None:
    long = ["--data", data, "--recipe", "long", "--epochs", 3, "--sum-head-steps", 500]
    alone = run_job("train", *long, "--storage-path", tmp_path / "alone", "--name", "mine")
    name = ["--storage-path", tmp_path / "stopped", "--name", "mine"]
    manifest = tmp_path / "stopped" / "mine" / "manifest.json"
    codes = []
    for moment in range(MOMENTS):
        begun = [*name, "--resume"] if manifest.exists() else [*long, *name]
        number = NUMBERS[moment % len(NUMBERS)]
        codes.append(stop(Job("train", *begun), alone.seconds * (0.02 + 0.9 * moment / MOMENTS), number))
        if codes[-1] == 128 + number and manifest.exists():
            assert json.loads(manifest.read_text())["status"] == "stopped"
        assert codes[-1] in (128 + number, 0)
    assert sum(code != 0 for code in codes) >= MOMENTS - 2
    assert left(run_job("train", *name, "--resume")) == left(alone)


@pytest.mark.sweep
def test_scoring_stopped_at_ten_moments(model: Path, pairs: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    command = flags(model, pairs, tmp_path / "out")
    alone = run_job("score", *flags(model, pairs, tmp_path / "alone")).seconds
    codes = []
    for moment in range(MOMENTS):
        number = NUMBERS[moment % len(NUMBERS)]
        codes.append(stop(Job("score", *command), alone * (0.02 + 0.9 * moment / MOMENTS), number))
        assert codes[-1] in (128 + number, 3)
    assert sum(code != 3 for code in codes) >= MOMENTS - 4
    run_job("score", *command)
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, id="SIGKILL"), pytest.param(signal.SIGHUP, id="SIGHUP", marks=pytest.mark.sweep)],
)
@pytest.mark.parametrize(
    "seconds", [pytest.param(seconds, marks=[pytest.mark.sweep] * (seconds != 4)) for seconds in range(2, 7)]
)
def test_processes_left_by_a_kill_while_ray_starts_end_by_themselves(
    tmp_path: Path, number: signal.Signals, seconds: float
) -> None:
    job = Job("train", "--data", "sample", "--storage-path", tmp_path)
    time.sleep(seconds)
    job.process.send_signal(number)
    job.wait()
    job.check_nothing_left(seconds=15)
