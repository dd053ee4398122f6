"""A node is lost, drained or added during a job: the job continues, with the result of an undisturbed run."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import Done, Job, add_node, kill_everything, nodes, report_duration, run_job
from tests.integration.test_score_kills import content, wait_for_files

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")

# An epoch of 3 to 20 s, so that a node is removed before the end. Small batches and float32 keep it from being much
# shorter on newer processors.
EVERY, TRAIN_ROWS, BATCH, EPOCHS = 1, 4_000, 32, 3
TRAINING = ["--batch-size", BATCH, "--precision", "fp32", "--name", "mine"]
TWO = [*TRAINING, "--epochs", EPOCHS, "--num-workers", 2]


# Weights and training losses from `weights`, and the test metrics.
RunResult = tuple[tuple[bytes, list[float]], dict[str, Any]]


def weights(storage: Path) -> tuple[bytes, list[float]]:
    """Return the model file and the training loss of each epoch: the model may be of an epoch before the disturbance."""
    history = (storage / "mine" / "history.jsonl").read_text().splitlines()
    return (storage / "mine" / "model" / "model.safetensors").read_bytes(), [json.loads(line)["train_loss"] for line in history]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The result of an undisturbed run on two nodes."""
    storage = tmp_path_factory.mktemp("alone")
    with nodes(0, 1, 1) as cluster:
        done = run_job("train", "--data", data, "--storage-path", storage, *TWO, address=cluster.address)
    assert "2 CPU workers" in done.err
    return weights(storage), done.line["test"]


def check_done(done: Done, storage: Path, undisturbed: RunResult) -> None:
    assert done.line["test"] == undisturbed[1], done.err
    assert weights(storage) == undisturbed[0]


def test_a_lost_node_costs_at_most_its_epoch(data: Path, tmp_path: Path, undisturbed: RunResult) -> None:
    with nodes(0, 1, 1) as cluster:
        job = Job("train", "--data", data, "--storage-path", tmp_path, *TWO, address=cluster.address)
        job.wait_for_line("epoch 2: train loss")  # the checkpoint of the first epoch has been saved
        cluster.remove_node(last_node(cluster), allow_graceful=False)
        lost = time.monotonic()
        add_node(cluster)
        job.wait_for_line("going on after epoch")
        report_duration("training, one of two nodes lost and another come: went on", lost)
        done = job.wait()
    assert re.search(r"going on after epoch [1-3], on 2 workers", done.err), done.err
    check_done(done, tmp_path, undisturbed)


@pytest.mark.sweep
def test_a_lost_node_changes_nothing_where_rows_are_streamed(data: Path, tmp_path: Path) -> None:
    """Here the workers hold all CPUs: a task that reserves one would wait for ever."""
    files = tmp_path / "rows.parquet"
    pq.write_table(pq.read_table(data), files, row_group_size=100)
    flags = ["--data", files, *TWO, "--shuffle-rows", 1000, "--storage-path"]
    with nodes(0, 1, 1) as cluster:
        alone = run_job("train", *flags, tmp_path / "alone", address=cluster.address)
        job = Job("train", *flags, tmp_path / "lost", address=cluster.address)
        job.wait_for_line("epoch 2: train loss")  # the checkpoint of the first epoch has been saved
        cluster.remove_node(last_node(cluster), allow_graceful=False)
        add_node(cluster)
        done = job.wait()
    assert "streaming 4,000 training rows" in done.err
    assert re.search(r"going on after epoch [1-3], on 2 workers", done.err), done.err
    check_done(done, tmp_path / "lost", (weights(tmp_path / "alone"), alone.line["test"]))


def last_node(cluster: Cluster) -> Any:
    """A node that is not the head; the driver has joined the head."""
    return cluster.list_all_nodes()[-1]


@pytest.mark.sweep
def test_a_drained_node_costs_seconds_and_not_the_epoch(data: Path, tmp_path: Path, undisturbed: RunResult) -> None:
    notice = 8
    with nodes(0, 1, 1) as cluster:
        job = Job("train", "--data", data, "--storage-path", tmp_path, *TWO, address=cluster.address)
        job.wait_for_line(f"epoch 1/{EPOCHS}")
        node = last_node(cluster)
        command = [RAY, "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*command, "--deadline-remaining-seconds", str(notice)], check=True, capture_output=True)
        taken_at = time.monotonic() + notice
        job.wait_for_line("a node is about to be taken away: saving after step")
        add_node(cluster)
        time.sleep(max(0, taken_at - time.monotonic()))
        cluster.remove_node(node, allow_graceful=False)
        job.wait_for_line("going on after epoch")
        report_duration("training, a drained node taken and another come: went on", taken_at)
        done = job.wait()
    check_done(done, tmp_path, undisturbed)
    before, after = done.err.split("going on after epoch ", maxsplit=1)
    resumed = re.match(r"(\d+)(?:, step (\d+) of the next)?, on 2 workers", after)
    saved = re.search(r"saving after step (\d+) of epoch (\d+)", before)
    assert resumed, after
    assert saved, before
    kept = int(resumed[1]) * TRAIN_ROWS + int(resumed[2] or 0) * BATCH
    assert kept >= (int(saved[2]) - 1) * TRAIN_ROWS + int(saved[1]) * BATCH > 0
    epoch, seen = re.findall(rf"epoch (\d+)/{EPOCHS} +([\d,]+) of", before)[-1]
    assert (int(epoch) - 1) * TRAIN_ROWS + int(seen.replace(",", "")) - kept < 0.9 * TRAIN_ROWS, done.err


@pytest.mark.sweep
def test_an_elastic_run_starts_with_one_worker_and_grows(data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--storage-path", tmp_path, *TRAINING, "--num-workers", "1,2", "--epochs", 4]
    with nodes(0, 1) as cluster:
        job = Job("train", *flags, address=cluster.address)
        job.wait_for_line("epoch 1/4")
        add_node(cluster)
        done = job.wait()
    assert re.search(r"going on after epoch \d.*, on 2 workers", done.err), done.err
    assert done.line["test"]["digit_accuracy"] > 0.97


@pytest.mark.sweep
def test_a_local_folder_that_a_node_does_not_see_is_refused(data: Path, model: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "in").mkdir(parents=True)
    shutil.copy(data, here / "in" / "rows.parquet")
    address = "--address {} --num-cpus 1 --object-store-memory 200000000 --block"
    with nodes(1) as cluster:
        start = f"mount -t tmpfs tmpfs {here} && exec {RAY} start {address.format(cluster.address)}"
        alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
        may = subprocess.run([*alone, f"mount -t tmpfs tmpfs {here}"], capture_output=True, text=True)
        if may.returncode:
            pytest.skip(f"needs permission to mount a file system for one process only: {may.stderr}")
        node = subprocess.Popen([*alone, start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while sum(one["Alive"] for one in cluster.global_state.node_table()) < 2:
                assert node.poll() is None
                time.sleep(0.2)
            said = "does not see what this one sees there; name a folder that all nodes share, or s3://"
            train = ["--data", data, "--storage-path", here / "runs"]
            score = ["--model", model, "--number-column", "digit", "--input"]
            for job, flag, flags in (
                ("train", f"--storage-path {here}/runs", train),
                ("train", f"--data {here}/in/rows.parquet", ["--data", here / "in", "--storage-path", tmp_path / "runs"]),
                ("score", f"--output {here}/out", [*score, data, "--output", here / "out"]),
                ("score", f"--input {here}/in/rows.parquet", [*score, here / "in", "--output", tmp_path / "out"]),
            ):
                done = run_job(job, *flags, address=cluster.address)
                assert done.code == 2, done.err
                assert f"error: {flag}" in done.err
                assert said in done.err
            assert [path.name for path in here.iterdir()] == ["in"], "the marker files are deleted"
        finally:
            kill_everything(node.pid)
            node.wait(timeout=30)


@pytest.mark.sweep
def test_scoring_continues_on_the_remaining_nodes(model: Path, tmp_path: Path) -> None:
    rows = 40_000
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=rows, files=8), print)
    flags = ["--model", model, "--input", tmp_path / "in", "--max-rows-per-file", 500]
    with nodes(0, 1, 1, 1) as cluster:
        alone = run_job("score", *flags, "--output", tmp_path / "alone", address=cluster.address)
        job = Job("score", *flags, "--output", tmp_path / "out", address=cluster.address)
        wait_for_files(tmp_path / "out", 6)
        cluster.remove_node(last_node(cluster), allow_graceful=False)
        lost = time.monotonic()
        assert job.process.poll() is None
        there = len(list((tmp_path / "out" / "predictions").glob("part-*.parquet")))
        assert there < rows / 500
        wait_for_files(tmp_path / "out", there + 1)
        report_duration("scoring, one of three nodes lost: the next file", lost)
        done = job.wait()
    assert alone.line["scored_rows"] == done.line["scored_rows"] == rows
    assert "3 CPU workers" in done.err
    assert content(tmp_path / "out") == content(tmp_path / "alone")
