"""Clusters of several nodes: one joins during a run, and one does not see a folder."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mnistsum_ray.errors import RequestError
from tests.integration.conftest import (
    RAY,
    Job,
    add_node,
    history_of,
    joined,
    kill_everything,
    nodes,
    score_here,
    train_here,
)

pytestmark = pytest.mark.slow

EVERY = 5


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    """A head without CPUs, and a node."""
    with nodes(0, 1) as cluster:
        yield cluster


def test_an_elastic_run_grows(started: Cluster, data: Path, tmp_path: Path) -> None:
    """Every 30 s a run looks for more workers; it is stopped after an epoch with two."""
    flags = ["--data", data, "--storage-path", tmp_path, "--name", "mine"]
    flags += ["--epochs", 1000, "--num-workers", "1,2"]
    job = Job("train", *flags, address=started.address)
    job.wait_for_line("epoch 1: ")
    add_node(started)
    line = job.wait_for_line("going on after epoch")
    grown = re.match(r"going on after epoch (\d+).*, on 2 workers", line)
    assert grown
    job.wait_for_line(f"epoch {int(grown[1]) + 1}: loss ")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code == 128 + signal.SIGTERM
    workers = [line["workers"] for line in history_of(tmp_path / "mine")]
    assert workers[: int(grown[1]) + 1] == [*[1] * int(grown[1]), 2]


def test_a_local_folder_that_a_node_does_not_see_is_refused(
    started: Cluster,
    data: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    here = tmp_path / "here"
    (here / "in").mkdir(parents=True)
    shutil.copy(data, here / "in" / "rows.parquet")
    address = f"--address {started.address} --num-cpus 1 --object-store-memory 200000000 --block"
    start = f"mount -t tmpfs tmpfs {here} && exec {RAY} start {address}"
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    may = subprocess.run([*alone, f"mount -t tmpfs tmpfs {here}"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"needs permission to mount for one process only: {may.stderr}")

    def living() -> int:
        return sum(one["Alive"] for one in started.global_state.node_table())

    before = living()
    node = subprocess.Popen([*alone, start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while living() == before:
            assert node.poll() is None
            time.sleep(0.2)
        said = "does not see what this one sees there; name a folder that all nodes share"
        with joined(started):
            with pytest.raises(RequestError, match=f"^--storage-path {here}/runs.*{said}"):
                train_here(data=data, storage_path=here / "runs")
            with pytest.raises(RequestError, match=f"^--input {here}/in/rows.parquet.*{said}"):
                score_here(model, tmp_path / "out", here / "in", number_column="digit")
    finally:
        kill_everything(node.pid)
        node.wait(timeout=30)
