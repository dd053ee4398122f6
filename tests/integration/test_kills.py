"""Processes that really die, and weights that are the same to the last bit (one CPU worker)."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnistsum_ray.training.state import STATE_CARD, STATE_FILE
from tests.integration.conftest import Done, Job, descendants, kill_everything, kill_worker, report_duration, run_job
from tests.integration.test_refusals import check_refused

EVERY = 4

# With all that a run draws: numbers, order, distortions, dropout.
LONG = ("--recipe", "long", "--epochs", 3, "--sum-head-steps", 1000)


def left(done: Done) -> tuple[bytes, list[float]]:
    """What must be the same: the model, and, since it may be of an early epoch, the losses of every epoch."""
    history = (Path(done.line["run"]) / "history.jsonl").read_text().splitlines()
    weights = (Path(done.line["model"]) / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in history]
    return weights, [loss for line in lines for loss in (line["train_loss"], *(loss for _, loss in line["step_losses"]))]


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
    report_duration("training, a worker killed: went on", killed)
    job.wait_for_line("fine-tuning the sum head")
    assert not [title for title in descendants(job.process.pid).values() if "PlacementGroupCleaner" in title]
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
    report_duration("training, everything killed: went on, from the same command with --resume,", again)
    done = job.wait()
    assert left(done) == undisturbed
    assert "going on after epoch" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.sweep)], ids=lambda number: number.name
)
@pytest.mark.sweep
def test_a_run_is_not_resumed_while_it_goes_on_but_when_a_signal_has_stopped_it(
    tmp_path: Path, data: Path, undisturbed: tuple[bytes, list[float]], number: signal.Signals
) -> None:
    job = Job("train", "--data", data, *LONG, "--storage-path", tmp_path, "--name", "mine")
    job.wait_for_line("epoch 1: train loss")
    refused = run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume")
    check_refused(refused, f"error: --name {tmp_path}/mine: another run (", seconds=10)
    assert "is writing there; wait for it, or choose another" in refused.err
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)  # as a terminal does
    else:
        job.process.send_signal(number)
    done = job.wait(timeout=60)
    job.check_nothing_left()
    assert (done.code, done.out) == (128 + number, "")
    command = f"python jobs/train.py --storage-path {tmp_path} --name mine --resume"
    said = f"stopped by {number.name}; checkpoints are kept, and this command resumes: {command}"
    assert done.err.splitlines()[-1] == said
    assert "Traceback" not in done.err
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "stopped"
    assert left(run_job("train", *command.split()[2:])) == undisturbed
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "finished"


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "the last checkpoint is gone": (lambda run: shutil.rmtree(run / "epoch_00002"), "going on after epoch 1"),
    "its tensors are gone": (
        lambda run: (run / "epoch_00002" / "trainer.safetensors").unlink(),
        "/epoch_00002 cannot be used: a file is missing",
    ),
    "its tensors are cut short": (
        lambda run: os.truncate(run / "epoch_00002" / "trainer.safetensors", 100_000),
        "/epoch_00002 cannot be used: trainer.safetensors is incomplete or damaged (SHA-256 differs)",
    ),
    "Ray's list is cut short": (
        lambda run: os.truncate(run / "checkpoint_manager_snapshot.json", 50),
        "going on after epoch 2",
    ),
    "Ray's list is gone": (lambda run: (run / "checkpoint_manager_snapshot.json").unlink(), "going on after epoch 2"),
    "none is whole": (
        lambda run: [(run / f"epoch_0000{epoch}" / "trainer.json").write_text("{") for epoch in (1, 2)],
        "no checkpoint can be used, so the run starts from the beginning",
    ),
}


IN_GATE = {"its tensors are cut short"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of a run `mine` that was killed in its third epoch."""
    runs = tmp_path_factory.mktemp("killed")
    job = Job("train", "--data", data, *LONG, "--storage-path", runs, "--name", "mine")
    job.wait_for_line("epoch 2: train loss")
    second = runs / "mine" / "epoch_00002"
    while not all((second / name).exists() for name in (STATE_FILE, STATE_CARD)):
        time.sleep(0.02)
    kill_everything(job.process.pid)
    job.wait()
    assert not (runs / "mine" / "epoch_00003").exists(), "killed too late"
    return runs


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("harm", [pytest.param(harm, marks=[pytest.mark.sweep] * (harm not in IN_GATE)) for harm in HARM])
def test_whatever_happened_to_the_checkpoints_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, killed: Path, undisturbed: tuple[bytes, list[float]], harm: str
) -> None:
    shutil.copytree(killed, tmp_path / "runs")
    do, said = HARM[harm]
    do(tmp_path / "runs" / "mine")
    done = run_job("train", "--storage-path", tmp_path / "runs", "--name", "mine", "--resume")
    assert said in done.err
    assert left(done) == undisturbed


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', "[" * 100_000])
def test_a_manifest_that_does_not_say_what_the_run_was_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(text)
    check_refused(run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume"), "; start another run")
