"""What a run finds when it goes on: damaged checkpoints, other rows in its files, a lock that is another's."""

import hashlib
import json
import os
import re
import shutil
import signal
from _thread import interrupt_main
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.api import run_training
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RunError, RunInterrupted
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE
from tests.integration.conftest import Bomb, Job, Trained, kill_worker, mounted, once, train_here, write_shuffled_sample

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

STREAMED: dict[str, Any] = {
    "recipe": "long",
    "epochs": 3,
    "batch_size": 32,
    "sum_head_steps": 50,
    "shuffle_rows": 1000,
    "name": "mine",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files without statistics, dictionaries or compression, so that a changed digit leaves the footer as it is."""
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    return write_shuffled_sample(tmp_path_factory.mktemp("data") / "rows", rows=1600, **options)


@pytest.fixture(scope="module")
def stopped(cluster: str, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The runs folder of the run `mine` that was stopped in its third epoch."""
    runs = tmp_path_factory.mktemp("stopped")
    with once((runs / "mine" / "epoch_00002" / STATE_CARD).exists, interrupt_main), pytest.raises(RunInterrupted):
        train_here(data=data, storage_path=runs, **STREAMED)
    assert not (runs / "mine" / "epoch_00003").exists(), "stopped too late"
    return runs


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory, stopped: Path) -> Trained:
    """The same run from its beginning, since it finds no whole checkpoint."""
    runs = Path(shutil.copytree(stopped, tmp_path_factory.mktemp("restarted") / "runs"))
    for path in (runs / "mine").glob(f"epoch_*/{STATE_CARD}"):
        path.write_text("{")
    return train_here(storage_path=runs, name="mine", resume=True)


def test_without_a_whole_checkpoint_a_run_starts_again(restarted: Trained) -> None:
    assert "no checkpoint can be used, so the run starts from the beginning" in restarted.said
    assert "streaming 1,280 training rows, shuffled in windows of 992; holds at most 2 MiB" in restarted.said
    assert restarted.said.count(": loss ") == 3
    files = pq.read_table(Path(restarted.line["run"]) / "data_files.parquet")
    assert (files["rows"].to_pylist(), files["checksum"].null_count) == ([400] * 4, 0)


def test_a_run_without_its_bad_rows_is_resumed_exactly(tmp_path: Path, data: Path) -> None:
    """Of streamed files; manifest and report count the rows."""
    folder, runs = Path(shutil.copytree(data, tmp_path / "bad")), [tmp_path / "whole", tmp_path / "stopped"]
    rows = pq.read_table(folder / "2.parquet").to_pylist()
    for row in rows[::4]:
        row["digit"] = 11
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"image": pa.binary(), "digit": pa.int8()})), folder / "2.parquet")
    settings = STREAMED | {"data": folder, "skip_bad_rows": True, "epochs": 2}
    whole = train_here(storage_path=runs[0], **settings)
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    assert f"left out: 100 of 1,600 rows: 2.parquet: row 0: {reason} | 2.parquet: row 4: " in whole.said
    manifest = json.loads((runs[0] / "mine" / "manifest.json").read_text())
    assert sum(whole.line["data"][f"{split}_rows"] for split in ("train", "validation", "test")) == 1500
    places = [["2.parquet", row] for row in range(0, 20, 4)]
    assert manifest["data"]["bad_rows"] == {"rows": 100, "reasons": {reason: 100}, "examples": {reason: places}}
    assert f"<td>100</td><td>{reason}</td><td>2.parquet, row 0; " in (runs[0] / "mine" / "report.html").read_text()
    with once((runs[1] / "mine" / "epoch_00001" / STATE_CARD).exists, interrupt_main), pytest.raises(RunInterrupted):
        train_here(storage_path=runs[1], **settings)
    resumed = train_here(storage_path=runs[1], name="mine", resume=True)
    assert "going on after epoch 1" in resumed.said
    assert resumed.weights() == whole.weights()


def change_a_digit(file: Path) -> None:
    """Change a digit of a file whose digits are plain bytes, and leave its footer and its time as they are."""
    before, modified = pq.read_table(file)["digit"].to_numpy()[:300], file.stat().st_mtime_ns
    data, plain = bytearray(file.read_bytes()), before.astype("<i4").tobytes()
    assert data.count(plain) == 1
    data[data.index(plain)] = (before[0] + 1) % 10
    file.write_bytes(data)
    os.utime(file, ns=(modified, modified))


def test_a_damaged_checkpoint_is_passed_over_and_rows_that_changed_are_found_by_content(
    tmp_path: Path, data: Path, stopped: Path, restarted: Trained, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `--resume` and by `--from-run`. Neither the footer nor the time of the file tells, and the run goes on from a copy.

    The damaged checkpoint holds a pickle, which is not executed. The one before it, from which the run goes on, cannot be
    deleted: a folder in it is mounted, which stops root too.
    """
    copy, runs = tmp_path / "copy", [tmp_path / "first", tmp_path / "second"]
    shutil.copytree(data, copy)
    for folder in runs:
        shutil.copytree(stopped, folder)
    before, last = sorted((runs[0] / "mine").glob("epoch_*"))[-2:]
    (last / STATE_FILE).write_bytes(bomb.pickled)
    card = json.loads((last / STATE_CARD).read_text())
    (last / STATE_CARD).write_text(json.dumps(card | {"sha256": hashlib.sha256(bomb.pickled).hexdigest()}))
    os.truncate(runs[0] / "mine" / "checkpoint_manager_snapshot.json", 50)
    (before / "busy").mkdir()
    resume = {"name": "mine", "resume": True, "data": str(copy)}
    with mounted(before / "busy", "1m") as busy:
        finished = train_here(storage_path=runs[0], **resume)
    assert f"checkpoint {last} cannot be used: trainer.safetensors is incomplete or damaged" in finished.said
    assert not bomb.mark.exists(), "the pickle was executed"
    assert finished.weights() == restarted.weights()
    assert json.loads((runs[0] / "mine" / "manifest.json").read_text())["status"] == "finished"
    change_a_digit(copy / "2.parquet")
    for settings in (resume, {"name": "other", "from_run": finished.line["run"]}):
        with pytest.raises(RunError, match=f"^{copy}/2.parquet: holds other rows than when the run, or the run of --from-run"):
            run_training(TrainConfig(storage_path=str(runs[1]), **settings))
        assert capsys.readouterr().err.count("failed") <= 1, "another attempt would find the same"
    if not busy:
        pytest.skip("a checkpoint that cannot be deleted needs the right to mount a file system")
    assert re.search(rf"{before}: cannot be deleted: .*; this checkpoint is no longer needed", finished.said)


def test_a_file_that_changes_within_a_run_is_found_by_content(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that takes the place of a killed one reads the files again, and not rows that were read before the change."""
    copy = shutil.copytree(data, tmp_path / "copy")

    def change_and_kill() -> None:
        change_a_digit(copy / "2.parquet")
        kill_worker(os.getpid(), "RayTrainWorker")

    config = TrainConfig(data=str(copy), storage_path=str(tmp_path), **STREAMED | {"epochs": 9})
    with (
        once((tmp_path / "mine" / "epoch_00002" / STATE_CARD).exists, change_and_kill),
        pytest.raises(RunError, match=f"^{copy}/2.parquet: holds other rows than when the run"),
    ):
        run_training(config)
    assert capsys.readouterr().err.count("going on after epoch") == 1, "another attempt would find the same"


def test_a_run_that_loses_its_lock_ends_at_once_also_where_sigint_is_ignored(cluster: str, data: Path, tmp_path: Path) -> None:
    """A shell starts `command &` in a script with SIGINT ignored."""
    flags = ["--data", data, "--epochs", 1000, "--storage-path", tmp_path, "--name", "a"]
    job = Job("train", *flags, address=cluster, before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    job.wait_for_line("epoch 1: loss ")
    (tmp_path / "a" / "_lock").unlink()
    (tmp_path / "a" / "_lock").write_text('{"id": "another run"}')
    done = job.wait(timeout=60)
    assert done.code == 1
    assert "another run has taken the output (another run)" in done.error
    assert "going on after epoch" not in done.err, "another attempt would fail in the same way"
    assert "Traceback" not in done.err
