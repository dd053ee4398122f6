"""Join a cluster with a token, and submit jobs to it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import RAY, ROOT, kill_everything

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """A new home folder, also Ray's temporary one; its path is short because a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@dataclass
class Head:
    """A head with a token, started by `ray start` in the home folder."""

    home: Path
    address: str
    environment: dict[str, str]
    """Environment of a client of its dashboard."""

    def ray(self, *words: str) -> str:
        """Run `ray job WORDS` as a client; return its output."""
        command = [str(RAY), "job", *words]
        return subprocess.check_output(command, env=self.environment, text=True, timeout=240)


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[Head]:
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with socket.socket() as dashboard, socket.socket() as agent:
        for probe in (dashboard, agent):
            probe.bind(("127.0.0.1", 0))
        port, agent_port = (probe.getsockname()[1] for probe in (dashboard, agent))
    # The agent starts submitted jobs. Another cluster's may have its usual port here.
    ports = ["--port=0", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"]
    command = [str(RAY), "start", "--head", "--block", *ports, "--num-cpus=2"]
    here = os.environ | {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}  # of submitted jobs too
    silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=here, cwd=home, **silent)
    try:
        client = here | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
        deadline = time.monotonic() + 120
        # The dashboard lists jobs before the agent that starts them is ready.
        ready = [str(RAY), "job", "submit", "--no-wait", "--", "true"]
        while subprocess.run(ready, env=client, **silent).returncode:
            assert time.monotonic() < deadline
            assert process.poll() is None
        yield Head(home, (home / "ray" / "ray_current_cluster").read_text().strip(), client)
    finally:
        kill_everything(process.pid)
        process.wait(timeout=30)


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
    command = [sys.executable, "-P", "-c", JOIN, *addresses]
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)


def test_a_head_with_a_token_is_joined_or_refuses_in_one_line(head: Head) -> None:
    once_more = head.address.replace(head.address.rpartition(":")[0], "127.0.0.1")
    token: dict[str, Any] = {"RAY_AUTH_MODE": "token", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    joined = join(head.address, once_more, **token)
    assert joined.stdout.count("on the Ray cluster at ") == 2, joined.stderr
    wrong_token = "token is missing or incorrect; RAY_AUTH_MODE=token sends the token of "
    cases: list[tuple[dict[str, Any], str]] = [
        (token | {"RAY_AUTH_MODE": "disabled"}, wrong_token),
        (token | {"RAY_AUTH_TOKEN": "0" * 64}, wrong_token),
        (token | {"OTHER_VERSION": "2.59.0"}, "install the versions of the cluster here"),
    ]
    for environment, said in cases:
        refused = join(head.address, **environment).stderr.splitlines()[-1]
        problem = f"RequestError: the Ray cluster at {head.address} cannot be joined: "
        assert refused.startswith(problem)
        assert said in refused


def test_submitted_jobs(head: Head, model: Path) -> None:
    """From a working directory. A job that is stopped says how to resume."""
    # Relative paths begin at home.
    project, run = head.home / "project", head.home / "runs" / "stopped"
    for part in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / part, project / part)
    with (project / "mnistsum_ray" / "__init__.py").open("a") as package:
        package.write('\n__version__ = "9.9.9"\n')  # the manifest shows it if this copy has run
    pq.write_table(pq.read_table(SAMPLE)[::16], head.home / "small.parquet")
    submit, job = ["submit", "--working-dir", str(project)], f"job-{secrets.token_hex(4)}"
    train = ["python", "jobs/train.py", "--data", "small.parquet", "--epochs", "500"]
    train += ["--name", "stopped"]
    head.ray(*submit, "--submission-id", job, "--no-wait", "--", *train)
    deadline = time.monotonic() + 180
    while not (run / "history.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    head.ray("stop", job)
    log = head.ray("logs", job)
    command = f"python jobs/train.py --storage-path {run.parent} --name stopped --resume"
    assert f"stopped by SIGTERM; checkpoints are kept, and this command resumes: {command}" in log
    assert "Traceback" not in log
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["versions"]["mnistsum_ray"]) == ("stopped", "9.9.9")

    pairs = head.home / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(pairs), rows=500, files=2), print)
    (pairs / "bad.parquet").write_bytes(b"no")
    score = ["python", "jobs/score.py", "--model", str(model), "--input", "in"]
    said = head.ray(*submit, "--", *score, "--output", "scored")
    line = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    assert (line["scored_rows"], line["failed_files"]) == (500, 1)
    assert (head.home / "scored" / "manifest.json").exists()
