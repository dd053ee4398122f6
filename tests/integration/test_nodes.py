"""A node is lost, drained or added during a job: the job continues, with the result of an undisturbed run."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.scoring.crash_counter import start_crash_counter
from mnistsum_ray.storage.paths import locate
from tests.integration.conftest import Job, add_node, kill_everything, nodes, report_duration, run_job
from tests.integration.test_kills import left, wait_for_checkpoint
from tests.integration.test_score_kills import content, wait_for_files

pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")

# An epoch of 3 to 20 s, so that a node is removed before the end. Small batches and float32 keep it from being much
# shorter on newer processors.
EVERY, BATCH, EPOCHS = 1, 32, 2
TRAINING = ["--batch-size", BATCH, "--precision", "fp32", "--checkpoint-seconds", 0.5, "--sum-head-steps", 100, "--name", "mine"]
TWO = [*TRAINING, "--epochs", EPOCHS, "--num-workers", 2]

WAYS: dict[str, list[object]] = {"in memory": [], "streamed": ["--shuffle-rows", 1000]}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each. A test that loses a node adds another."""
    with nodes(0, 1, 1) as cluster:
        yield cluster


def last_node(cluster: Cluster) -> Any:
    """A node that is not the head; the driver has joined the head."""
    return cluster.list_all_nodes()[-1]


@pytest.mark.parametrize("way", WAYS)
def test_a_lost_node_costs_a_few_steps_and_changes_nothing(two_nodes: Cluster, data: Path, tmp_path: Path, way: str) -> None:
    """The workers hold all CPUs: a task that reserves one would wait for ever. Blocks of the lost node are computed again."""
    flags = ["--data", data, *TWO, *WAYS[way], "--storage-path"]
    alone = run_job("train", *flags, tmp_path / "alone", address=two_nodes.address)
    assert "2 CPU workers" in alone.err
    job = Job("train", *flags, tmp_path / "lost", address=two_nodes.address)
    job.wait_for_line("epoch 1: train loss")
    wait_for_checkpoint(locate(str(tmp_path / "lost" / "mine"), "--name"), "epoch_00001_step_0000048", job)
    node = last_node(two_nodes)
    if way == "streamed":  # with notice, as a cloud gives it
        command = [RAY, "drain-node", "--address", two_nodes.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "2"]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(2)
    two_nodes.remove_node(node, allow_graceful=False)
    lost = time.monotonic()
    add_node(two_nodes)
    job.wait_for_line("going on after epoch 1, step")
    report_duration(f"training {way}, one of two nodes lost and another come: went on", lost)
    done = job.wait()
    assert left(done) == left(alone)
    assert done.line["test"] == alone.line["test"]


def test_an_elastic_run_starts_with_one_worker_and_grows(data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--storage-path", tmp_path, *TRAINING, "--num-workers", "1,2", "--epochs", 4]
    with nodes(0, 1) as cluster:
        job = Job("train", *flags, address=cluster.address)
        job.wait_for_line("epoch 1/4")
        add_node(cluster)
        done = job.wait()
    assert re.search(r"going on after epoch \d.*, on 2 workers", done.err), done.err
    assert done.line["test"]["digit_accuracy"] > 0.97


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


def test_scoring_continues_on_the_remaining_nodes(model: Path, tmp_path: Path) -> None:
    rows = 40_000
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=rows, files=8), print)
    flags = ["--model", model, "--input", tmp_path / "in", "--max-rows-per-file", 500]
    with nodes(0, 1, 1, 1) as cluster:
        alone = run_job("score", *flags, "--output", tmp_path / "alone", address=cluster.address)
        job = Job("score", *flags, "--output", tmp_path / "out", address=cluster.address)
        wait_for_files(tmp_path / "out", 6)
        lost = last_node(cluster).node_id
        cluster.remove_node(last_node(cluster), allow_graceful=False)
        lost_at = time.monotonic()
        assert job.process.poll() is None
        there = len(list((tmp_path / "out" / "predictions").glob("part-*.parquet")))
        assert there < rows / 500
        wait_for_files(tmp_path / "out", there + 1)
        report_duration("scoring, one of three nodes lost: the next file", lost_at)
        done = job.wait()
        check_that_a_lost_node_costs_no_life(cluster, lost)
    assert alone.line["scored_rows"] == done.line["scored_rows"] == rows
    assert "3 CPU workers" in done.err
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def check_that_a_lost_node_costs_no_life(cluster: Cluster, lost: str) -> None:
    """Attempts at a file that ended with their node are not among the three after which the file is given up."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        counter, here = start_crash_counter(), last_node(cluster).node_id
        attempts = [ray.get(counter.begin.remote("file", node)) for node in (lost, here, lost, here)]
    finally:
        ray.shutdown()
    assert attempts == [1, 1, 2, 2]
