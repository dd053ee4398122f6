"""Join a cluster with a token, and submit jobs to it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import RAY, ROOT, kill_everything

pytestmark = pytest.mark.slow

SILENT: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A new home folder, also Ray's temporary one, where a head with a token was started.

    Its path is short because a socket's must be. The environment is that of a client of the
    dashboard.
    """
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")  # of submitted jobs too
        subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
        dashboard = free_port()
        # The agent starts submitted jobs. Another cluster's may have its usual port here.
        ports = [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command: Any = [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=2", *ports]
        head = subprocess.Popen(command, cwd=folder, **SILENT)
        try:
            patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{dashboard}")
            patch.setenv("RAY_AUTH_MODE", "token")
            deadline = time.monotonic() + 120
            # The dashboard lists jobs before the agent that starts them is ready.
            while subprocess.run(
                [RAY, "job", "submit", "--no-wait", "--", "true"], **SILENT
            ).returncode:
                assert time.monotonic() < deadline
                assert head.poll() is None
            yield Path(folder)
        finally:
            kill_everything(head.pid)
            head.wait(timeout=30)


def ray_job(*words: str) -> str:
    """Run `ray job WORDS`; return its output."""
    return subprocess.check_output([str(RAY), "job", *words], text=True, timeout=240)


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


def test_a_head_with_a_token_is_joined_or_refuses_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")
    address = (home / "ray" / "ray_current_cluster").read_text().strip()
    joined = join(address, f"127.0.0.1:{address.rpartition(':')[2]}")
    assert joined.stdout.count("on the Ray cluster at ") == 2, joined.stderr
    wrong_token = "token is missing or incorrect; RAY_AUTH_MODE=token sends the token of "
    cases = {
        ("RAY_AUTH_MODE", "disabled"): wrong_token,
        ("RAY_AUTH_TOKEN", "0" * 64): wrong_token,
        ("OTHER_VERSION", "2.59.0"): "install the versions of the cluster here",
    }
    for (name, value), said in cases.items():
        refused = join(address, **{name: value}).stderr.splitlines()[-1]
        problem = f"RequestError: the Ray cluster at {address} cannot be joined: "
        assert refused.startswith(problem)
        assert said in refused


def test_submitted_jobs(home: Path, model: Path) -> None:
    """From a working directory. A job that is stopped says how to resume."""
    # Relative paths begin at home.
    project, run = home / "project", home / "runs" / "stopped"
    for part in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / part, project / part)
    with (project / "mnistsum_ray" / "__init__.py").open("a") as package:
        package.write('\n__version__ = "9.9.9"\n')  # the manifest shows it if this copy has run
    pq.write_table(pq.read_table(SAMPLE)[::16], home / "small.parquet")
    submit = ["submit", "--working-dir", str(project)]
    train = ["python", "jobs/train.py", "--data", "small.parquet", "--epochs", "500"]
    train += ["--name", "stopped"]
    ray_job(*submit, "--submission-id", "train", "--no-wait", "--", *train)
    deadline = time.monotonic() + 180
    while not (run / "history.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ray_job("stop", "train")
    log = ray_job("logs", "train")
    command = f"python jobs/train.py --storage-path {run.parent} --name stopped --resume"
    assert f"stopped by SIGTERM; checkpoints are kept, and this command resumes: {command}" in log
    assert "Traceback" not in log
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["versions"]["mnistsum_ray"]) == ("stopped", "9.9.9")

    pairs = home / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(pairs), rows=500, files=2), print)
    (pairs / "bad.parquet").write_bytes(b"no")
    score = ["python", "jobs/score.py", "--model", str(model), "--input", "in"]
    said = ray_job(*submit, "--", *score, "--output", "scored")
    line = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    assert (line["scored_rows"], line["failed_files"]) == (500, 1)
    assert (home / "scored" / "manifest.json").exists()
