"""A cluster of several nodes that leave and join during a run."""

import re
import signal
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.integration.conftest import add_node
from tests.jobs import Job, history_of, training

pytestmark = pytest.mark.nightly  # five minutes, most of which Ray waits


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
