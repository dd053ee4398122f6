"""Training whose processes really die, on a disk and on S3, in memory and streamed: weights that are the same to the last bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE
from tests.integration.conftest import Done, Job, descendants, kill_everything, kill_worker, report_duration, run_job
from tests.integration.test_refusals import check_refused

# With all that a run draws: numbers, order, distortions, dropout. An epoch has 125 steps.
LONG = ("--recipe", "long", "--epochs", 3, "--batch-size", 32, "--sum-head-steps", 1000)
STREAMED = (*LONG, "--shuffle-rows", 1500)

Result = tuple[str, list[float]]


def left(done: Done) -> Result:
    """What must be the same: the model, and the losses of every epoch."""
    history = (locate(done.line["run"], "--name") / "history.jsonl").read_bytes().splitlines()
    weights = (locate(done.line["model"], "--model") / "model.safetensors").read_bytes()
    losses = [
        loss for line in map(json.loads, history) for loss in (line["train_loss"], *(loss for _, loss in line["step_losses"]))
    ]
    return hashlib.sha256(weights).hexdigest(), losses


def rows_of(sample: pa.Table) -> pa.Table:
    """The sample with its digits mixed: every file has all of them."""
    return sample.take(pa.array(np.random.default_rng(0).permutation(sample.num_rows)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files without statistics, dictionaries or compression, so that a changed digit leaves the footer as it is."""
    folder, rows = tmp_path_factory.mktemp("data") / "rows", rows_of(pq.read_table(SAMPLE))
    folder.mkdir()
    for index in range(4):
        pq.write_table(
            rows.slice(index * 1250, 1250),
            folder / f"{index}.parquet",
            row_group_size=300,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
    return folder


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Result:
    runs = tmp_path_factory.mktemp("runs")
    return left(run_job("train", "--data", data, *LONG, "--storage-path", runs, "--name", "undisturbed"))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Result:
    runs = tmp_path_factory.mktemp("runs")
    done = run_job("train", "--data", data, *STREAMED, "--storage-path", runs, "--name", "undisturbed")
    assert "streaming 4,000 training rows, shuffled in windows of 1,472; holds at most 2 MiB" in done.err
    files = pq.read_table(runs / "undisturbed" / "data_files.parquet")
    assert (files["rows"].to_pylist(), files["checksum"].null_count) == ([1250] * 4, 0)
    return left(done)


def wait_for_checkpoint(run: Location, name: str, job: Job) -> None:
    """Wait until this checkpoint, or a later one, is whole."""
    while True:
        assert job.process.poll() is None
        found = {info.path.split("/")[-2] for info in run.files() if info.base_name == STATE_CARD}
        if any(folder >= name and folder.startswith("epoch_") for folder in found):
            return
        time.sleep(0.05)


def kill_and_resume(storage: str, flags: tuple[object, ...]) -> Done:
    """Kill everything within the second epoch and resume; then kill the worker twice, within an epoch and while it fine-tunes."""
    where = ["--storage-path", storage, "--name", "mine"]
    job = Job("train", *flags, "--checkpoint-seconds", 0.1, *where)
    job.wait_for_line("epoch 1: train loss")
    wait_for_checkpoint(locate(storage, "--storage-path") / "mine", "epoch_00001_step_0000032", job)
    kill_everything(job.process.pid)
    job.wait()
    job, again = Job("train", *where, "--resume"), time.monotonic()
    job.wait_for_line("going on after epoch 1, step")
    report_duration("training, everything killed: went on, from the same command with --resume,", again)
    job.wait_for_line("epoch 2: train loss")
    kill_worker(job.process.pid, "RayTrainWorker")
    killed = time.monotonic()
    job.wait_for_line("going on after epoch")
    report_duration("training, a worker killed: went on", killed)
    job.wait_for_line("fine-tuning the sum head")
    assert not [title for title in descendants(job.process.pid).values() if "PlacementGroupCleaner" in title]
    kill_worker(job.process.pid, "RayTrainWorker")
    done = job.wait()
    assert done.err.count("worker 0 failed") == 2
    assert done.err.count("fine-tuning the sum head") == 2
    return done


@pytest.mark.slow
def test_everything_killed_within_an_epoch_and_workers_killed_change_nothing(
    tmp_path: Path, data: Path, in_memory: Result
) -> None:
    assert left(kill_and_resume(str(tmp_path), ("--data", data, *LONG))) == in_memory


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_nor_do_they_where_rows_are_streamed_from_s3(data: Path, streamed: Result) -> None:
    for path in data.iterdir():
        (locate("s3://images/kills", "--data") / path.name).write_bytes(path.read_bytes())
    assert left(kill_and_resume("s3://runs/kills", ("--data", "s3://images/kills", *STREAMED))) == streamed


@pytest.mark.slow
def test_stopped_by_signals_it_is_resumed_to_the_same_bits(tmp_path: Path, data: Path, in_memory: Result) -> None:
    where = ["--storage-path", str(tmp_path), "--name", "mine"]
    job = Job("train", "--data", data, *LONG, *where)
    job.wait_for_line("epoch 1: train loss")
    refused = run_job("train", *where, "--resume")
    check_refused(refused, f"error: --name {tmp_path}/mine: another run (", seconds=10)
    assert "is writing there; wait for it, or choose another" in refused.err
    for number, line in ((signal.SIGINT, ""), (signal.SIGTERM, "fine-tuning")):
        if line:
            job = Job("train", *where, "--resume")
            job.wait_for_line(line)
        os.killpg(job.process.pid, number)  # as a terminal does
        done = job.wait(timeout=60)
        job.check_nothing_left()
        assert (done.code, done.out) == (128 + number, "")
        command = f"python jobs/train.py --storage-path {tmp_path} --name mine --resume"
        assert done.err.splitlines()[-1] == (
            f"stopped by {number.name}; checkpoints are kept, and this command resumes: {command}"
        )
        assert "Traceback" not in done.err
        assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "stopped"
    assert left(run_job("train", *command.split()[2:])) == in_memory
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_run_that_loses_its_lock_ends_at_once_also_where_sigint_is_ignored(tmp_path: Path) -> None:
    """A shell starts `command &` in a script with SIGINT ignored."""
    command = [
        sys.executable,
        "jobs/train.py",
        "--data",
        "sample",
        "--epochs",
        "40",
        "--storage-path",
        str(tmp_path),
        "--name",
        "a",
    ]
    job = subprocess.Popen(
        command,
        env=os.environ | {"RAY_ADDRESS": "local"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert job.stderr is not None
    for line in job.stderr:
        if line.startswith("epoch 1: train loss"):
            break
    (tmp_path / "a" / "_lock").unlink()
    (tmp_path / "a" / "_lock").write_text('{"id": "another run"}')
    lost, said = time.monotonic(), job.communicate(timeout=60)[1]
    assert (job.returncode, time.monotonic() - lost < 20) == (1, True)
    assert "another run has taken the output (another run)" in said.splitlines()[-1]
    assert "going on after epoch" not in said, "another attempt would fail in the same way"
    assert "Traceback" not in said


HARM: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "its tensors are cut short, and Ray's list": (
        lambda run, last: [os.truncate(path, 50) for path in (last / STATE_FILE, run / "checkpoint_manager_snapshot.json")],  # type: ignore[func-returns-value]
        " cannot be used: trainer.safetensors is incomplete or damaged (SHA-256 differs)",
    ),
    "none is whole": (
        lambda run, last: [path.write_text("{") for path in run.glob("epoch_*/trainer.json")],
        "no checkpoint can be used, so the run starts from the beginning",
    ),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of a streamed run `mine` that was killed in its third epoch."""
    runs = tmp_path_factory.mktemp("killed")
    job = Job("train", "--data", data, *STREAMED, "--storage-path", runs, "--name", "mine")
    job.wait_for_line("epoch 2: train loss")
    wait_for_checkpoint(locate(str(runs), "--storage-path") / "mine", "epoch_00002", job)
    kill_everything(job.process.pid)
    job.wait()
    assert not (runs / "mine" / "epoch_00003").exists(), "killed too late"
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
def test_whatever_happened_to_the_checkpoints_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, killed: Path, streamed: Result, harm: str
) -> None:
    shutil.copytree(killed, tmp_path / "runs")
    run = tmp_path / "runs" / "mine"
    do, said = HARM[harm]
    do(run, max(run.glob("epoch_*")))
    done = run_job("train", "--storage-path", tmp_path / "runs", "--name", "mine", "--resume")
    assert said in done.err
    assert left(done) == streamed


def change_a_digit(file: Path) -> None:
    """Change a digit of a file whose digits are plain bytes, and leave its footer and its time as they are."""
    before, modified = pq.read_table(file)["digit"].to_numpy()[:300], file.stat().st_mtime_ns
    data, plain = bytearray(file.read_bytes()), before.astype("<i4").tobytes()
    assert data.count(plain) == 1
    data[data.index(plain)] = (before[0] + 1) % 10
    file.write_bytes(data)
    os.utime(file, ns=(modified, modified))


@pytest.mark.slow
def test_rows_that_changed_are_found_by_content_by_resume_and_by_from_run(tmp_path: Path, data: Path, killed: Path) -> None:
    """Neither the footer nor the time of the file tells, and the run goes on from a copy of its files."""
    copy, runs = tmp_path / "copy", [tmp_path / "first", tmp_path / "second"]
    shutil.copytree(data, copy)
    for folder in runs:
        shutil.copytree(killed, folder)
    resume = ["--name", "mine", "--resume", "--data", copy]
    finished = run_job("train", "--storage-path", runs[0], *resume)
    assert finished.code == 0, finished.err
    change_a_digit(copy / "2.parquet")
    said = f"error: {copy}/2.parquet: holds other rows than when the run, or the run of --from-run, read it first"
    for flags in (resume, ["--name", "other", "--from-run", finished.line["run"]]):
        done = run_job("train", "--storage-path", runs[1], *flags)
        assert done.code == 1, done.err
        assert done.err.splitlines()[-1].startswith(said), done.err
        assert done.err.count("streaming 4,000 training rows") == 1
        assert done.err.count("failed") <= 1, "another attempt would find the same"


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', "[" * 100_000])
def test_a_manifest_that_does_not_say_what_the_run_was_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(text)
    check_refused(run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume"), "; start another run")
