"""What a run finds when it goes on: damaged checkpoints, other rows in its files, a lock that is another's."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE
from tests.integration.conftest import Bomb, Done, Job, kill_worker, mounted, run_job, write_shuffled_sample

STREAMED = ["--recipe", "long", "--epochs", 3, "--batch-size", 32, "--sum-head-steps", 100, "--shuffle-rows", 1500]


def weights(done: Done) -> bytes:
    return (locate(done.line["model"], "--model") / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files without statistics, dictionaries or compression, so that a changed digit leaves the footer as it is."""
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    return write_shuffled_sample(tmp_path_factory.mktemp("data") / "rows", rows=2500, **options)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of the run `mine` that was killed in its third epoch."""
    runs = tmp_path_factory.mktemp("killed")
    job = Job("train", "--data", data, *STREAMED, "--storage-path", runs, "--name", "mine")
    job.wait_until((runs / "mine" / "epoch_00002" / STATE_CARD).exists)
    job.kill()
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
    assert "streaming 2,000 training rows, shuffled in windows of 1,472; holds at most 2 MiB" in restarted.err
    assert restarted.err.count(": loss ") == 3
    files = pq.read_table(Path(restarted.line["run"]) / "data_files.parquet")
    assert (files["rows"].to_pylist(), files["checksum"].null_count) == ([625] * 4, 0)


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
    cluster: str, tmp_path: Path, data: Path, killed: Path, restarted: Done, bomb: Bomb
) -> None:
    """By `--resume` and by `--from-run`. Neither the footer nor the time of the file tells, and the run goes on from a copy.

    The damaged checkpoint holds a pickle, which is not executed. The one before it, from which the run goes on, cannot be
    deleted: a folder in it is mounted, which stops root too.
    """
    copy, runs = tmp_path / "copy", [tmp_path / "first", tmp_path / "second"]
    shutil.copytree(data, copy)
    for folder in runs:
        shutil.copytree(killed, folder)
    before, last = sorted((runs[0] / "mine").glob("epoch_*"))[-2:]
    (last / STATE_FILE).write_bytes(bomb.pickled)
    card = json.loads((last / STATE_CARD).read_text())
    (last / STATE_CARD).write_text(json.dumps(card | {"sha256": hashlib.sha256(bomb.pickled).hexdigest()}))
    os.truncate(runs[0] / "mine" / "checkpoint_manager_snapshot.json", 50)
    (before / "busy").mkdir()
    resume = ["--name", "mine", "--resume", "--data", copy]
    with mounted(before / "busy", "1m") as busy:
        finished = run_job("train", "--storage-path", runs[0], *resume, address=cluster)
    assert f"checkpoint {last} cannot be used: trainer.safetensors is incomplete or damaged" in finished.err
    assert not bomb.mark.exists(), "the pickle was executed"
    assert weights(finished) == weights(restarted)
    assert json.loads((runs[0] / "mine" / "manifest.json").read_text())["status"] == "finished"
    change_a_digit(copy / "2.parquet")
    said = f"error: {copy}/2.parquet: holds other rows than when the run, or the run of --from-run, read it first"
    for flags in (resume, ["--name", "other", "--from-run", finished.line["run"]]):
        done = run_job("train", "--storage-path", runs[1], *flags, address=cluster)
        assert done.code == 1, done.err
        assert done.error.startswith(said)
        assert done.err.count("streaming 2,000 training rows") == 1
        assert done.err.count("failed") <= 1, "another attempt would find the same"
    if not busy:
        pytest.skip("a checkpoint that cannot be deleted needs the right to mount a file system")
    assert re.search(rf"{before}: cannot be deleted: .*; this checkpoint is no longer needed", finished.err)


@pytest.mark.slow
def test_a_file_that_changes_within_a_run_is_found_by_content(cluster: str, tmp_path: Path, data: Path) -> None:
    """A worker that takes the place of a killed one reads the files again, and not rows that were read before the change."""
    copy = shutil.copytree(data, tmp_path / "copy")
    flags = ["--data", copy, *STREAMED, "--epochs", 9, "--storage-path", tmp_path, "--name", "mine"]
    job = Job("train", *flags, address=cluster)
    job.wait_until((tmp_path / "mine" / "epoch_00002" / STATE_CARD).exists)
    change_a_digit(copy / "2.parquet")
    kill_worker(os.getpid(), "RayTrainWorker")
    done = job.wait()
    assert done.code == 1
    assert done.error.startswith(f"error: {copy}/2.parquet: holds other rows than when the run")
    assert done.err.count("going on after epoch") == 1, "another attempt would find the same"


@pytest.mark.slow
def test_a_run_that_loses_its_lock_ends_at_once_also_where_sigint_is_ignored(cluster: str, tmp_path: Path) -> None:
    """A shell starts `command &` in a script with SIGINT ignored."""
    flags = ["--data", "sample", "--epochs", 1000, "--storage-path", tmp_path, "--name", "a"]
    job = Job("train", *flags, address=cluster, before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    job.wait_for_line("epoch 1: loss ")
    (tmp_path / "a" / "_lock").unlink()
    (tmp_path / "a" / "_lock").write_text('{"id": "another run"}')
    done = job.wait(timeout=60)
    assert done.code == 1
    assert "another run has taken the output (another run)" in done.error
    assert "going on after epoch" not in done.err, "another attempt would fail in the same way"
    assert "Traceback" not in done.err
