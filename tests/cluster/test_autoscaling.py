"""A cluster with Ray's real autoscaler, whose nodes are raylets on this machine: they come, work, and all go."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray.util import get_node_ip_address

from mnistsum_ray.cluster.connection import can_connect, connect
from mnistsum_ray.data.sources import SAMPLE
from tests.integration.conftest import RAY, Job, kill_everything, no_job_is_left  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

_IDLE_SECONDS = 10
_NODE = {"CPU": 2, "object_store_memory": 200 * 2**20}
_HEAD_ID = "f" * 51 + "00000"  # the fake provider's


@contextmanager
def autoscaling_cluster(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A head without CPUs, to which the autoscaler adds up to 3 nodes with CPUs and 2 with a GPU; this process has joined it.

    `ray.cluster_utils.AutoscalingCluster` is this with a `ray stop --force`, which would end other clusters of the machine.
    """
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"]
    config = {
        "cluster_name": "fake",
        "max_workers": 5,
        "idle_timeout_minutes": _IDLE_SECONDS / 60,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",  # by its type it needs a file that is not in the wheel
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpus": {"resources": _NODE, "node_config": {}, "max_workers": 3},
            "gpus": {"resources": _NODE | {"GPU": 1}, "node_config": {}, "max_workers": 2},
        },
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in lists},
    }
    (folder / "autoscaling.yaml").write_text(json.dumps(config))
    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
    if version == "v2":
        environment |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": _HEAD_ID}
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=0", f"--port={port}", "--include-dashboard=false"]
    command += [f"--autoscaling-config={folder / 'autoscaling.yaml'}", f"--object-store-memory={200 * 2**20}"]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not can_connect(get_node_ip_address(), port):
            assert head.poll() is None, (folder / "ray.log").read_text()
            time.sleep(0.2)
        ray.shutdown()
        monkeypatch.setenv("RAY_ADDRESS", address)
        connect()
        yield
    finally:
        ray.shutdown()
        kill_everything(head.pid)
        head.wait()


def workers() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != _HEAD_ID]


@pytest.mark.parametrize("version", ["v2", pytest.param("v1", marks=pytest.mark.nightly)])
def test_nodes_come_work_and_all_go(version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a request without flags none comes with a GPU, and a training leaves no process that keeps its node up."""
    pq.write_table(pq.read_table(SAMPLE)[::10], tmp_path / "rows.parquet")
    train = ["--data", tmp_path / "rows.parquet", "--storage-path", tmp_path, "--name", "mine", "--epochs", 1]
    score = ["--model", model, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out", "--number-column", "digit"]
    with autoscaling_cluster(version, tmp_path, monkeypatch):
        for job, flags in (("train", [*train, "--sum-head-steps", 5]), ("score", score)):
            running, seen = Job(job, *flags, address=ray.get_runtime_context().gcs_address), list[dict[str, float]]()
            while running.process.poll() is None:
                seen += workers()
                time.sleep(0.5)
            assert running.wait().line
            assert seen
            assert not any(node.get("GPU") for node in seen)
            end = time.monotonic() + 60
            while left := workers():
                assert time.monotonic() < end, (job, left)
                time.sleep(0.5)
