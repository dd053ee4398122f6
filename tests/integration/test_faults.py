"""Faults around a job: the storage is overloaded, the disk is full, the head is killed. Committed files are kept."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.checkpoint import STATE_CARD, STATE_FILE, latest_valid_checkpoint
from tests.integration.conftest import Job, Storage, kill_everything, nodes, report_duration, run_job, wait_for_files

pytestmark = pytest.mark.slow

EVERY = 4
OVERLOADED_SECONDS = 20
ROWS = 30_000  # enough that the job is still running at the time of the fault, on a fast machine too


def pairs(folder: Path | str, rows: int) -> list[object]:
    """Write input files with this many rows; return the flags that score them."""
    export_pairs(ExportPairsConfig(data="sample", output=f"{folder}/in", rows=rows, files=4), print)
    return ["--input", f"{folder}/in", "--output", f"{folder}/out", "--max-rows-per-file", 250]


def test_jobs_outlast_a_storage_that_is_overloaded(s3: Storage, data: Path, model: Path) -> None:
    score = Job("score", "--model", model, *pairs("s3://scores/busy", 60_000))
    train = Job(
        "train", "--data", data, "--name", "mine", "--epochs", 3, "--sum-head-steps", 50, "--storage-path", "s3://runs/busy"
    )
    output = locate("s3://scores/busy/out", "--output")
    train.wait_for_line("epoch 1:")  # written just before the checkpoint
    wait_for_files(score, output, 1)
    refused = s3.refused
    s3.overload(OVERLOADED_SECONDS)
    time.sleep(OVERLOADED_SECONDS)
    better = time.monotonic()
    wait_for_files(score, output, 1)
    report_duration("scoring, a storage that answers 503 for 20 s: the next file, from when it answers,", better)
    train.wait_for_line("epoch 3:")
    report_duration("training, a storage that answers 503 for 20 s: the next epoch done, from when it answers,", better)
    trained, scored = train.wait(), score.wait()
    assert s3.refused > refused
    assert scored.line["input_rows"] == scored.line["scored_rows"] == 60_000
    history = locate("s3://runs/busy/mine/history.jsonl", "--storage-path").read_bytes().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == [1, 2, 3]
    assert trained.line["test"]["digit_accuracy"] > 0.5


def test_a_file_that_the_storage_does_not_give_is_not_called_bad(s3: Storage, cluster: str, model: Path) -> None:
    """At its footer, and at its rows when some of them are committed: the run ends, and nothing is deleted."""
    root, end, refused = locate("s3://scores/refused", "--output"), "part-00001.parquet", s3.refused
    flags = {where: ["--model", model, *pairs((root / where).display, 20_000)] for where in ("footer", "rows")}
    for info in (root / "rows" / "in").files():  # in row groups that are read one after the other
        table, sink = pq.ParquetFile(pa.BufferReader(root.at(info.path).read_bytes())).read(), pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=250)
        root.at(info.path).write_bytes(sink.getvalue())
    s3.statuses[f"footer/in/{end}"] = "503 Slow Down"
    try:
        jobs = {where: Job("score", *of_job, address=cluster) for where, of_job in flags.items()}
        out = root / "rows" / "out"
        while len(before := [info.path for info in out.files() if f"/predictions/{end[:-8]}" in info.path]) < 2:
            assert jobs["rows"].process.poll() is None
            time.sleep(0.05)
        s3.statuses[f"rows/in/{end}"] = "403 Forbidden"
        done = {where: job.wait() for where, job in jobs.items()}
    finally:
        s3.statuses.clear()
    for where, ended in done.items():
        assert ended.code == 1, ended.err
        assert f"{where}/in/{end}: cannot be read" in ended.err.splitlines()[-1]
        assert "repair it" not in ended.err
    assert s3.refused > refused
    assert {*before} <= {info.path for info in out.files()}
    assert run_job("score", *flags["rows"], address=cluster).line["scored_rows"] == 20_000


def test_an_input_folder_that_is_moved_away_ends_the_run_and_costs_nothing(cluster: str, model: Path, tmp_path: Path) -> None:
    flags = ["--model", model, *pairs(tmp_path, ROWS)]
    job = Job("score", *flags, address=cluster)
    wait_for_files(job, tmp_path / "out", 8)
    (tmp_path / "in").rename(tmp_path / "away")
    done = job.wait()
    assert done.code == 1, done.err
    assert "is not there any more, or not on this node" in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].endswith("committed files are kept, and the same command resumes")
    committed = {path: path.read_bytes() for path in (tmp_path / "out" / "predictions").iterdir()}
    assert len(committed) >= 8
    (tmp_path / "away").rename(tmp_path / "in")
    again = run_job("score", *flags, address=cluster)
    assert again.line["scored_rows"] == ROWS
    assert again.line["resumed_rows"] >= 250 * len(committed)
    assert all(path.read_bytes() == content for path, content in committed.items())


def test_epochs_do_not_wait_for_slow_storage(s3: Storage, cluster: str, data: Path) -> None:
    s3.write_seconds = 2.0  # the S3 client gives up after 3
    try:
        flags = ["--data", data, "--name", "mine", "--epochs", 6, "--sum-head-steps", 50, "--storage-path", "s3://runs/slow"]
        done = run_job("train", *flags, address=cluster)
    finally:
        s3.write_seconds = 0.0
    run = locate(done.line["run"], "--storage-path")
    epochs = [json.loads(line) for line in (run / "history.jsonl").read_bytes().splitlines()]
    assert [line["epoch"] for line in epochs] == list(range(1, 7))
    ends = [line["started"] + line["seconds"] + line["evaluation_seconds"] for line in epochs]
    gaps = [after["started"] - end for end, after in zip(ends, epochs[1:], strict=False)]
    assert max(gaps) < 1.0, gaps
    saved = {Path(info.path).parent.name for info in run.files() if info.base_name == STATE_FILE}
    assert saved == {"epoch_00006", "epoch_00006_sum_head"}, "Ray Train keeps the last two"


def test_keys_in_a_uri_are_written_down_nowhere(s3: Storage, cluster: str, data: Path) -> None:
    locate("s3://images/rows.parquet", "--data").write_bytes(data.read_bytes())
    bucket = "s3://AKIAEXAMPLE:topsecret@scores/keys"
    export_pairs(ExportPairsConfig(data="sample", output=f"{bucket}/in", rows=100, files=2), print)
    (locate(f"{bucket}/in", "--input") / "bad.parquet").write_bytes(b"no")
    train = ["--data", "s3://AKIAEXAMPLE:topsecret@images/rows.parquet", "--storage-path", f"{bucket}/runs", "--name", "mine"]
    trained = run_job("train", *train, "--epochs", 1, "--sum-head-steps", 50, address=cluster)
    assert trained.line["run"] == "s3://scores/keys/runs/mine"
    score = ["--model", f"{bucket}/runs/mine", "--input", f"{bucket}/in", "--output", f"{bucket}/out"]
    scored = run_job("score", *score, address=cluster)
    assert (scored.code, scored.last_line["scored_rows"]) == (3, 100), scored.err
    for done in (trained, scored):
        assert "topsecret" not in done.out + done.err
    place = locate("s3://scores/keys", "bucket")
    written = [info.path for info in place.files()]
    assert "scores/keys/out/manifest.json" in written
    for path in written:
        assert b"topsecret" not in place.at(path).read_bytes(), path


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of this size on a folder. Skips the test where this user may not mount one."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "2m"):
        yield folder


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)


def test_scoring_onto_a_disk_that_is_full(small_disk: Path, cluster: str, model: Path, tmp_path: Path) -> None:
    output = small_disk / "out"
    flags = ["--model", model, *pairs(tmp_path, 20_000), "--output", output]
    (small_disk / "other").write_bytes(bytes(2 * 2**20 - 150_000))
    full = run_job("score", *flags, address=cluster)
    assert full.code == 1
    assert f"error: --output {output}: cannot be written:" in full.err
    assert "No space left on device" in full.err
    assert not (output / "manifest.json").exists()
    enlarge(small_disk)
    done = run_job("score", *flags, address=cluster)
    assert done.line["scored_rows"] == 20_000
    assert done.line["resumed_rows"] > 0


def test_training_onto_a_disk_that_is_full(small_disk: Path, cluster: str, data: Path) -> None:
    flags = ["--data", data, "--storage-path", small_disk, "--name", "mine", "--epochs", 1, "--sum-head-steps", 50]
    full = run_job("train", *flags, "--max-failures", 0, address=cluster)
    assert full.code == 1
    assert "No space left on device" in full.err
    assert "--name mine --resume" in full.err
    enlarge(small_disk)
    assert run_job("train", *flags, "--resume", address=cluster).line["test"]["rows"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_fail_a_finished_run(cluster: str, data: Path, tmp_path: Path) -> None:
    """A mounted folder in the checkpoint that the run is resumed from: to delete it fails, for root too."""
    flags, run = ["--storage-path", tmp_path, "--name", "mine"], tmp_path / "mine"
    job = Job("train", "--data", data, *flags, "--epochs", 10, "--sum-head-steps", 50)
    while not list(run.glob(f"epoch_*/{STATE_CARD}")):
        assert job.process.poll() is None
        time.sleep(0.05)
    kill_everything(job.process.pid)
    job.wait()
    start = latest_valid_checkpoint(locate(str(run), "--name"), print)
    assert start is not None
    busy = Path(start.path) / "busy"
    busy.mkdir()
    with mounted(busy, "1m"):
        done = run_job("train", *flags, "--resume", address=cluster)
    assert done.line["test"]["rows"] == pq.read_metadata(data).num_rows // 10
    assert f"{busy.parent} is no longer needed, and cannot be deleted" in done.err
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


def test_a_head_that_is_killed_ends_the_job_and_costs_nothing_that_is_committed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # Ray's default of 60 s would only make the test longer
    flags = ["--model", model, *pairs(tmp_path, ROWS)]
    with nodes(1, 1) as cluster:
        job = Job("score", *flags, address=cluster.address)
        wait_for_files(job, tmp_path / "out", 8)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        killed = time.monotonic()
        done = job.wait()
        assert done.code == 1, done.err
        report_duration("scoring, the head killed: the job ended, saying so,", killed)
    job, started = Job("score", *flags), time.monotonic()
    wait_for_files(job, tmp_path / "out", 1)
    report_duration("scoring, the head killed: the next file, from the same command,", started)
    again = job.wait()
    assert again.line["scored_rows"] == ROWS
    assert again.line["resumed_rows"] > 0
