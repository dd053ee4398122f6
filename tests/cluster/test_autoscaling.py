"""A cluster with Ray's real autoscaler, whose nodes are raylets here: they come, and all go."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.util import get_node_ip_address

from mnistsum_ray.cluster.connection import connect
from tests.conftest import write_sample
from tests.jobs import RAY, Job, free_port, kill_everything, scoring, training, wait_until

pytestmark = pytest.mark.nightly  # a minute each, in which they want two idle cores

_NODE = {"CPU": 2, "object_store_memory": 200 * 2**20}
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # the fake provider's
_EMPTY_LISTS = """
initialization_commands setup_commands head_setup_commands worker_setup_commands
head_start_ray_commands worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter
"""
_EMPTY_OBJECTS = "auth docker file_mounts"
"""Keys that Ray's schema demands."""


@contextmanager
def autoscaling_cluster(folder: Path) -> Iterator[str]:
    """The address of a head without CPUs, to which up to 3 nodes with CPUs and 2 with a GPU come.

    `ray.cluster_utils.AutoscalingCluster` is this with a `ray stop --force`, which would end other
    clusters of the machine.
    """
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    provider = {
        "type": "external",  # by its type it needs a file that is not in the wheel
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    head_type = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {
        _HEAD_TYPE: head_type,
        "cpus": {"resources": _NODE, "node_config": {}, "max_workers": 3},
        "gpus": {"resources": _NODE | {"GPU": 1}, "node_config": {}, "max_workers": 2},
    }
    config = {
        "cluster_name": "fake",
        "max_workers": 5,
        "idle_timeout_minutes": 1 / 6,
        "upscaling_speed": 10,
        "provider": provider,
        "head_node_type": _HEAD_TYPE,
        "available_node_types": types,
        **{key: {} for key in _EMPTY_OBJECTS.split()},
        **{key: [] for key in _EMPTY_LISTS.split()},
    }
    (folder / "scaling.yaml").write_text(json.dumps(config))
    given = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    given |= {"RAY_AUTH_MODE": "disabled"}
    given |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": _HEAD_ID}
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=0", f"--port={port}"]
    command += [f"--autoscaling-config={folder / 'scaling.yaml'}", "--include-dashboard=false"]
    command += [f"--object-store-memory={200 * 2**20}"]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=os.environ | given, stdout=log, stderr=log)
    try:
        while socket.socket().connect_ex((get_node_ip_address(), port)):
            assert head.poll() is None, (folder / "ray.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        ray.shutdown()
        kill_everything(head.pid)
        head.wait()


def workers() -> list[dict[str, float]]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in alive if node["NodeID"] != _HEAD_ID]


def test_nodes_come_work_and_all_go(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None comes with a GPU, and a training leaves no process that keeps its node up."""
    rows = write_sample(tmp_path / "rows.parquet", 500)
    train = training(rows, tmp_path, "--epochs", 1, "--num-workers", 3)
    score = scoring(model, rows, tmp_path / "out", "--number-column", "digit")
    ray.shutdown()
    with autoscaling_cluster(tmp_path) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        connect()
        for words, nodes in ((train, 2), (score, 1)):
            job = Job(*words, address=address)
            seen: list[list[dict[str, float]]] = []
            while job.process.poll() is None:
                seen.append(workers())
                time.sleep(0.5)
            assert job.wait().line
            assert max(map(len, seen)) >= nodes
            assert not any(node.get("GPU") for there in seen for node in there)
            wait_until(lambda: not workers())
