"""Join a cluster with a token, submit jobs to it; start a cluster, and leave no process of it."""

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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import RAY, ROOT, descendants, kill_everything

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """A new home folder, which is also Ray's temporary folder. Its path is short because a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def killed(home: Path) -> set[int]:
    """The sessions of the processes that a driver has left which was killed while Ray started.

    It is killed before the other tests here: Ray's agents try for a minute to report that to the server that has ended.
    """
    code = "from mnistsum_ray.cluster.connection import connect; connect()"
    environment = os.environ | {"RAY_ADDRESS": "local"}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any("raylet/raylet" in title for title in descendants(driver.pid).values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sessions = {os.getsid(process) for process in descendants(driver.pid)}
    driver.kill()
    driver.wait()
    return sessions


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
        done = subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True, timeout=240)
        return done.stdout


@pytest.fixture(scope="module")
def head(home: Path, killed: set[int]) -> Iterator[Head]:
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with socket.socket() as dashboard, socket.socket() as agent:
        for probe in (dashboard, agent):
            probe.bind(("127.0.0.1", 0))
        port, agent_port = (probe.getsockname()[1] for probe in (dashboard, agent))
    # The agent starts submitted jobs. That of another cluster on this machine may have its usual port.
    ports = ["--port=0", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"]
    command = [str(RAY), "start", "--head", "--block", *ports, "--num-cpus=2"]
    here = os.environ | {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}  # of submitted jobs too
    process = subprocess.Popen(command, env=here, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = here | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
        deadline = time.monotonic() + 120
        # The dashboard lists jobs before the agent that starts them is ready.
        while subprocess.run([RAY, "job", "submit", "--no-wait", "--", "true"], env=client, capture_output=True).returncode:
            assert time.monotonic() < deadline
            assert process.poll() is None
        yield Head(home, (home / "ray" / "ray_current_cluster").read_text().strip(), client)
    finally:
        kill_everything(process.pid)
        process.wait(timeout=30)


def run_script(script: str, *args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script, without the working folder in the import path."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-P", "-c", script, *args]
    return subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=150)


JOIN = """
import os, ray, sys
from mnistsum_ray.cluster.connection import connect, disconnect

ray.__version__ = os.environ.get("OTHER_VERSION", ray.__version__)
for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    try:
        connect()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    ray.get(ray.remote(lambda: None).remote())
    print(ray.cluster_resources()["CPU"])
    disconnect()
"""


def test_a_head_with_a_token_is_joined_by_its_address_or_refuses_in_one_line(head: Head) -> None:
    once_more = head.address.replace(head.address.rpartition(":")[0], "127.0.0.1")
    token: dict[str, Any] = {"RAY_AUTH_MODE": "token", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    joined = run_script(JOIN, head.address, once_more, **token)
    assert (joined.returncode, joined.stdout) == (0, "2.0\n2.0\n"), joined.stderr
    wrong_token = "token is missing or incorrect; RAY_AUTH_MODE=token sends the token of "
    cases: list[tuple[dict[str, Any], str]] = [
        (token | {"RAY_AUTH_MODE": "disabled"}, wrong_token),
        (token | {"RAY_AUTH_TOKEN": "0" * 64}, wrong_token),
        (token | {"OTHER_VERSION": "2.59.0"}, "install the versions of the cluster here"),
    ]
    for environment, said in cases:
        refused = run_script(JOIN, head.address, **environment).stderr.splitlines()[-1]
        assert refused.startswith(f"RequestError: the Ray cluster at {head.address} cannot be joined: ")
        assert said in refused


def test_submitted_jobs(head: Head, model: Path) -> None:
    """From a working directory. A job that is stopped says how to resume."""
    project, run = head.home / "project", head.home / "runs" / "stopped"  # relative paths begin at home
    for part in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / part, project / part)
    with (project / "mnistsum_ray" / "__init__.py").open("a") as package:
        package.write('\n__version__ = "9.9.9"\n')  # the manifest shows it if this copy has run
    pq.write_table(pq.read_table(SAMPLE)[::16], head.home / "small.parquet")
    submit, job = ["submit", "--working-dir", str(project)], f"job-{secrets.token_hex(4)}"
    train = ["python", "jobs/train.py", "--data", "small.parquet", "--epochs", "500", "--name", "stopped"]
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

    export_pairs(ExportPairsConfig(data="sample", output=str(head.home / "in"), rows=500, files=2), print)
    (head.home / "in" / "bad.parquet").write_bytes(b"no")
    said = head.ray(*submit, "--", "python", "jobs/score.py", "--model", str(model), "--input", "in", "--output", "scored")
    line = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    assert (line["scored_rows"], line["failed_files"]) == (500, 1)
    assert (head.home / "scored" / "manifest.json").exists()


def living(session: int) -> list[str]:
    """The command lines of the processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter(["status", "cmdline"]):
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"])[:100])
    return found


def test_a_killed_driver_leaves_no_process(killed: set[int]) -> None:
    deadline = time.monotonic() + 100
    while left := [line for session in killed for line in living(session)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
