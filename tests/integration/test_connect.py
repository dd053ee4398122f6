"""Join a cluster with a token, and submit jobs to it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_sample
from tests.integration.test_readme import shell_of
from tests.jobs import RAY, ROOT, free_port, kill_everything, wait_until

pytestmark = pytest.mark.nightly

SILENT: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

JOIN = """
import os, ray, sys
from mnistsum_ray.cluster.connection import connect

ray.__version__ = os.environ.get("OTHER_VERSION", ray.__version__)
for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    try:
        print(connect())
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    ray.get(ray.remote(lambda: None).remote())
    ray.shutdown()
"""


def join(*addresses: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Connect a new process to each of these addresses in turn, as a job connects."""
    command = [sys.executable, "-P", "-c", JOIN, *addresses]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A new home folder, also Ray's temporary one, in the order of README: a job, then a head.

    The job starts its own cluster, and writes a token, for which the head then asks. The path is
    short because a socket's must be.
    """
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        # The default, 3 s, is less than the end of a training may take on a busy machine.
        patch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "30")
        patch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")  # of submitted jobs too
        assert "started Ray on this machine" in join("").stdout
        assert Path(folder, ".ray", "auth_token").exists()
        dashboard = free_port()
        # The agent starts submitted jobs. Another cluster's may have its usual port here.
        ports = [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command: Any = [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=2", *ports]
        head = subprocess.Popen(command, cwd=folder, **SILENT)
        try:
            patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{dashboard}")
            patch.setenv("RAY_AUTH_MODE", "token")
            wait_until(Path(folder, "ray", "ray_current_cluster").exists)
            yield Path(folder)
        finally:
            kill_everything(head.pid)
            head.wait(timeout=30)


def test_a_head_with_a_token_is_joined_or_refuses_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")
    address = (home / "ray" / "ray_current_cluster").read_text().strip()
    cases = {
        ("RAY_AUTH_TOKEN", "0" * 64): "token is missing or incorrect; RAY_AUTH_MODE=token sends ",
        ("OTHER_VERSION", "2.59.0"): "install the versions of the cluster here",
    }
    for (name, value), said in cases.items():
        refused = join(address, **{name: value}).stderr.splitlines()[-1]
        problem = f"RequestError: the Ray cluster at {address} cannot be joined: "
        assert refused.startswith(problem)
        assert said in refused
    joined = join(address)
    assert joined.stdout.count("on the Ray cluster at ") == 1, joined.stderr
    monkeypatch.delenv("RAY_AUTH_MODE")
    joined = join("", "auto")  # without RAY_ADDRESS: the cluster of this machine
    assert joined.stdout.count("on the Ray cluster at ") == 2, joined.stderr


def test_readmes_commands_for_a_team(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins: the head of `home` for its first and last step, and few rows for MNIST."""
    (home / "jobs").symlink_to(ROOT / "jobs")
    write_sample(home / "few.parquet", 500)
    commands = shell_of("For a team")
    for written, instead in (
        ("ray start --head\n", ""),
        ("ray stop\n", ""),
        ("--data mnist --recipe quick", "--data few.parquet --epochs 1"),
        ("--data mnist", "--data few.parquet --epochs 1"),
    ):
        assert written in commands
        commands = commands.replace(written, instead, 1)
    monkeypatch.delenv("RAY_AUTH_MODE")
    wait_for_job_agent()
    subprocess.run(["bash", "-ec", commands], cwd=home, check=True, timeout=300)
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o77 == 0
    for name in ("box", "later"):
        manifest = json.loads((home / "runs" / name / "manifest.json").read_text())
        assert manifest["status"] == "finished"


def wait_for_job_agent() -> None:
    """The dashboard lists jobs before the agent that starts them is ready."""
    probe: Any = [RAY, "job", "submit", "--no-wait", "--", "true"]
    variables = os.environ | {"RAY_AUTH_MODE": "token"}
    wait_until(lambda: subprocess.run(probe, env=variables, **SILENT).returncode == 0, 120)
