"""A cluster that has been killed leaves its address behind; neither that nor a wrong RAY_ADDRESS may hang a job."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import kill_everything, run_job


def test_nothing_at_ray_address(tmp_path: Path) -> None:
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, address="127.0.0.1:9")
    assert done.code == 2
    assert done.err.strip() == (
        "error: RAY_ADDRESS=127.0.0.1:9: no cluster answers there; correct it, or unset it to start one here"
    )
    assert done.seconds < 10


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps the address: not that of anybody else on this machine, and short, as a socket's path has to be."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_the_cluster_of_this_machine_was_killed(ray_folder: Path) -> None:
    ray = Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--port=0", "--num-cpus=1", "--include-dashboard=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (ray_folder / "ray" / "ray_current_cluster").exists():
        assert time.monotonic() < deadline
        assert head.poll() is None
        time.sleep(0.2)
    kill_everything(head.pid)
    head.wait(timeout=30)
    code = "import ray; from mnistsum_ray.connect import connect; connect(); print(ray.cluster_resources()['CPU'])"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) == os.cpu_count()
    assert head.returncode == -signal.SIGKILL
