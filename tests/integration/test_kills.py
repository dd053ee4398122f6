"""Processes that really die, and weights that are the same to the last bit (one CPU worker)."""

import time
from pathlib import Path

import pytest

from tests.integration.conftest import Job, kill_everything, kill_worker, run_job, tell

EVERY = 2

# With all that a run draws: numbers, order, distortions, dropout.
LONG = ("--recipe", "long", "--epochs", 3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> bytes:
    runs = tmp_path_factory.mktemp("runs")
    done = run_job("train", "--data", data, *LONG, "--storage-path", runs, "--name", "undisturbed")
    return (Path(done.line["model"]) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path, data: Path, undisturbed: bytes) -> None:
    job = Job("train", "--data", data, *LONG, "--storage-path", tmp_path, "--name", "worker")
    job.wait_for_line("epoch 2: train loss")
    kill_worker(job.process.pid, "RayTrainWorker")
    killed = time.monotonic()
    job.wait_for_line("going on after epoch")
    tell("training, a worker killed: went on", killed)
    done = job.wait()
    assert (Path(done.line["model"]) / "model.safetensors").read_bytes() == undisturbed
    assert "worker 0 failed" in done.err
    assert "going on after epoch" in done.err


def test_everything_killed_and_resumed_changes_nothing(tmp_path: Path, data: Path, undisturbed: bytes) -> None:
    job = Job("train", "--data", data, *LONG, "--storage-path", tmp_path, "--name", "all")
    job.wait_for_line("epoch 2: train loss")
    kill_everything(job.process.pid)
    job.wait()
    job, again = Job("train", "--storage-path", tmp_path, "--name", "all", "--resume"), time.monotonic()
    job.wait_for_line("going on after epoch")
    tell("training, everything killed: went on, from the same command with --resume,", again)
    done = job.wait()
    assert (Path(done.line["model"]) / "model.safetensors").read_bytes() == undisturbed
    assert "going on after epoch" in done.err
