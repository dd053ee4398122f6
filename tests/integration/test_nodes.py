"""Clusters of several nodes: they leave and join during a run, and one does not see a folder."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mnistsum_ray.errors import RequestError
from tests.integration.conftest import add_node, score_here
from tests.jobs import RAY, Job, history_of, kill_everything, training, wait_until

pytestmark = pytest.mark.slow


def test_an_elastic_run_shrinks_and_grows(four_nodes: Cluster, tmp_path: Path) -> None:
    """Ray waits 30 s for a node that was lost, and looks every 30 s for more workers."""
    flags = ["--epochs", 1000, "--num-workers", "1,3", "--threads", 2]
    job = Job(*training(Path("sample"), tmp_path, *flags), address=four_nodes.address)
    job.wait_for_line("epoch 2: loss ")
    four_nodes.remove_node(four_nodes.list_all_nodes()[-1], allow_graceful=False)
    line = job.wait_for_line("going on after epoch ")
    shrunk = re.match(r"going on after epoch (\d+), on 2 workers", line)
    assert shrunk, line
    add_node(four_nodes)
    line = job.wait_for_line("going on after epoch ")
    grown = re.match(r"going on after epoch (\d+), on 3 workers", line)
    assert grown, line
    job.wait_for_line(f"epoch {int(grown[1]) + 1}: loss ")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code == 128 + signal.SIGTERM
    workers = [line["workers"] for line in history_of(tmp_path / "mine")]
    first, second = int(shrunk[1]), int(grown[1])
    assert workers[: second + 1] == [*[3] * first, *[2] * (second - first), 3]


def test_a_local_folder_that_a_node_does_not_see_is_refused(
    four_nodes: Cluster,
    data: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    here = tmp_path / "here"
    (here / "in").mkdir(parents=True)
    shutil.copy(data, here / "in" / "rows.parquet")
    address = f"--address {four_nodes.address} --num-cpus 1 --object-store-memory 200000000 --block"
    start = f"mount -t tmpfs tmpfs {here} && exec {RAY} start {address}"
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    may = subprocess.run([*alone, f"mount -t tmpfs tmpfs {here}"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"needs permission to mount for one process only: {may.stderr}")

    def living() -> int:
        return sum(one["Alive"] for one in four_nodes.global_state.node_table())

    before = living()
    node = subprocess.Popen([*alone, start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: living() > before)
        said = "does not see what this one sees there; name a folder that all nodes share"
        with pytest.raises(RequestError, match=f"^--input {here}/in/rows.parquet.*{said}"):
            score_here(model, tmp_path / "out", here / "in", number_column="digit")
    finally:
        kill_everything(node.pid)
        node.wait(timeout=30)
