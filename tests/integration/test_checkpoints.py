"""What a run finds when it goes on: damaged checkpoints, other rows in its files, a lock that is another's."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE
from tests.integration.conftest import Done, Job, kill_everything, run_job
from tests.integration.test_refusals import check_refused

STREAMED = ["--recipe", "long", "--epochs", 3, "--batch-size", 32, "--sum-head-steps", 300, "--shuffle-rows", 1500]


def weights(done: Done) -> bytes:
    return (locate(done.line["model"], "--model") / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files without statistics, dictionaries or compression, so that a changed digit leaves the footer as it is."""
    folder, sample = tmp_path_factory.mktemp("data") / "rows", pq.read_table(SAMPLE)
    rows = sample.take(pa.array(np.random.default_rng(0).permutation(sample.num_rows)))
    folder.mkdir()
    options = {"row_group_size": 300, "compression": "none", "use_dictionary": False, "write_statistics": False}
    for index in range(4):
        pq.write_table(rows.slice(index * 1250, 1250), folder / f"{index}.parquet", **options)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of the run `mine` that was killed in its third epoch."""
    runs = tmp_path_factory.mktemp("killed")
    job = Job("train", "--data", data, *STREAMED, "--storage-path", runs, "--name", "mine")
    while not (runs / "mine" / "epoch_00002" / STATE_CARD).exists():
        assert job.process.poll() is None
        time.sleep(0.05)
    kill_everything(job.process.pid)
    job.wait()
    assert not (runs / "mine" / "epoch_00003").exists(), "killed too late"
    return runs


@pytest.fixture(scope="module")
def restarted(cluster: str, tmp_path_factory: pytest.TempPathFactory, killed: Path) -> Done:
    """The same run from its beginning, since it finds no whole checkpoint."""
    runs = Path(shutil.copytree(killed, tmp_path_factory.mktemp("restarted") / "runs"))
    for path in (runs / "mine").glob(f"epoch_*/{STATE_CARD}"):
        path.write_text("{")
    return run_job("train", "--storage-path", runs, "--name", "mine", "--resume", address=cluster)


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_run_starts_again(restarted: Done) -> None:
    assert "no checkpoint can be used, so the run starts from the beginning" in restarted.err
    assert "streaming 4,000 training rows, shuffled in windows of 1,472; holds at most 2 MiB" in restarted.err
    assert restarted.err.count(": train loss") == 3
    files = pq.read_table(Path(restarted.line["run"]) / "data_files.parquet")
    assert (files["rows"].to_pylist(), files["checksum"].null_count) == ([1250] * 4, 0)


def change_a_digit(file: Path) -> None:
    """Change a digit of a file whose digits are plain bytes, and leave its footer and its time as they are."""
    before, modified = pq.read_table(file)["digit"].to_numpy()[:300], file.stat().st_mtime_ns
    data, plain = bytearray(file.read_bytes()), before.astype("<i4").tobytes()
    assert data.count(plain) == 1
    data[data.index(plain)] = (before[0] + 1) % 10
    file.write_bytes(data)
    os.utime(file, ns=(modified, modified))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_rows_that_changed_are_found_by_content(
    cluster: str, tmp_path: Path, data: Path, killed: Path, restarted: Done
) -> None:
    """By `--resume` and by `--from-run`. Neither the footer nor the time of the file tells, and the run goes on from a copy."""
    copy, runs = tmp_path / "copy", [tmp_path / "first", tmp_path / "second"]
    shutil.copytree(data, copy)
    for folder in runs:
        shutil.copytree(killed, folder)
    last = max((runs[0] / "mine").glob("epoch_*"))
    for path in (last / STATE_FILE, runs[0] / "mine" / "checkpoint_manager_snapshot.json"):
        os.truncate(path, 50)
    resume = ["--name", "mine", "--resume", "--data", copy]
    finished = run_job("train", "--storage-path", runs[0], *resume, address=cluster)
    assert " cannot be used: trainer.safetensors is incomplete or damaged (SHA-256 differs)" in finished.err
    assert weights(finished) == weights(restarted)
    change_a_digit(copy / "2.parquet")
    said = f"error: {copy}/2.parquet: holds other rows than when the run, or the run of --from-run, read it first"
    for flags in (resume, ["--name", "other", "--from-run", finished.line["run"]]):
        done = run_job("train", "--storage-path", runs[1], *flags, address=cluster)
        assert done.code == 1, done.err
        assert done.err.splitlines()[-1].startswith(said), done.err
        assert done.err.count("streaming 4,000 training rows") == 1
        assert done.err.count("failed") <= 1, "another attempt would find the same"


@pytest.mark.slow
def test_a_run_that_loses_its_lock_ends_at_once_also_where_sigint_is_ignored(cluster: str, tmp_path: Path) -> None:
    """A shell starts `command &` in a script with SIGINT ignored."""
    flags = ["--data", "sample", "--epochs", "40", "--storage-path", str(tmp_path), "--name", "a"]
    job = subprocess.Popen(
        [sys.executable, "jobs/train.py", *flags],
        env=os.environ | {"RAY_ADDRESS": cluster},
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


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}', "[" * 100_000])
def test_a_manifest_that_does_not_say_what_the_run_was_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(text)
    check_refused(run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume"), "; start another run")
