"""Processes that really die, and weights that are the same to the last bit (one CPU worker)."""

import json
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Done, Job, kill_everything, kill_worker, run_job, tell

EVERY = 2

# With all that a run draws: numbers, order, distortions, dropout.
LONG = ("--recipe", "long", "--epochs", 3, "--sum-head-steps", 2000)


def left(done: Done) -> tuple[bytes, list[float]]:
    """What must be the same: the model, and, since it may be of an early epoch, the loss of every epoch."""
    history = (Path(done.line["run"]) / "history.jsonl").read_text().splitlines()
    weights = (Path(done.line["model"]) / "model.safetensors").read_bytes()
    return weights, [json.loads(line)["train_loss"] for line in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[bytes, list[float]]:
    runs = tmp_path_factory.mktemp("runs")
    return left(run_job("train", "--data", data, *LONG, "--storage-path", runs, "--name", "undisturbed"))


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path, data: Path, undisturbed: tuple[bytes, list[float]]) -> None:
    job = Job("train", "--data", data, *LONG, "--storage-path", tmp_path, "--name", "worker")
    job.wait_for_line("epoch 2: train loss")
    kill_worker(job.process.pid, "RayTrainWorker")
    killed = time.monotonic()
    job.wait_for_line("going on after epoch")
    tell("training, a worker killed: went on", killed)
    job.wait_for_line("fine-tuning the sum head")
    kill_worker(job.process.pid, "RayTrainWorker")
    done = job.wait()
    assert left(done) == undisturbed
    assert done.err.count("worker 0 failed") == done.err.count("going on after epoch") == 2
    assert done.err.count("fine-tuning the sum head") == 2


def test_everything_killed_and_resumed_changes_nothing(
    tmp_path: Path, data: Path, undisturbed: tuple[bytes, list[float]]
) -> None:
    job = Job("train", "--data", data, *LONG, "--storage-path", tmp_path, "--name", "all")
    job.wait_for_line("epoch 2: train loss")
    kill_everything(job.process.pid)
    job.wait()
    job, again = Job("train", "--storage-path", tmp_path, "--name", "all", "--resume"), time.monotonic()
    job.wait_for_line("going on after epoch")
    tell("training, everything killed: went on, from the same command with --resume,", again)
    done = job.wait()
    assert left(done) == undisturbed
    assert "going on after epoch" in done.err
