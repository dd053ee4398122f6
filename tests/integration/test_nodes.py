"""Clusters of several nodes: one joins during a run, and one does not see a folder."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import RAY, Job, add_node, kill_everything, nodes, run_job

pytestmark = pytest.mark.slow

EVERY = 1


def test_an_elastic_run_starts_with_one_worker_and_grows(data: Path, tmp_path: Path) -> None:
    """Every 30 s a run looks for more workers; it is stopped after an epoch with two, whose rows are counted as always."""
    flags = ["--data", data, "--storage-path", tmp_path, "--name", "mine", "--epochs", 1000, "--num-workers", "1,2"]
    with nodes(0, 1) as cluster:
        job = Job("train", *flags, address=cluster.address)
        job.wait_for_line("epoch 1: ")
        add_node(cluster)
        grown = re.match(r"going on after epoch (\d+).*, on 2 workers", job.wait_for_line("going on after epoch"))
        assert grown
        job.wait_for_line(f"epoch {int(grown[1]) + 1}: loss ")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait().code == 128 + signal.SIGTERM


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
            score = ["--model", model, "--number-column", "digit"]
            for job, flag, flags in (
                ("train", f"--storage-path {here}/runs", ["--data", data, "--storage-path", here / "runs"]),
                ("score", f"--input {here}/in/rows.parquet", ["--input", here / "in", "--output", tmp_path / "out", *score]),
            ):
                done = run_job(job, *flags, address=cluster.address)
                assert done.code == 2, done.err
                assert f"error: {flag}" in done.err
                assert said in done.err
            assert [path.name for path in here.iterdir()] == ["in"], "the refused request has left nothing"
        finally:
            kill_everything(node.pid)
            node.wait(timeout=30)
