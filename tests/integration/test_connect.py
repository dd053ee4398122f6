"""Join clusters with a token, or killed; start a cluster, and leave no process of it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

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


@contextmanager
def head(home: Path, **environment: str) -> Iterator[str]:
    """Run `ray start --head` as a person does, and yield the address of the cluster."""
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=1", "--include-dashboard=false"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address_file = home / "ray" / "ray_current_cluster"
    try:
        deadline = time.monotonic() + 120
        while not address_file.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        yield address_file.read_text().strip()
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


def test_a_head_with_a_token_is_joined_by_its_address_or_refuses_in_one_line(home: Path) -> None:
    with head(home) as address:
        once_more = address.replace(address.rpartition(":")[0], "127.0.0.1")
        joined = run_script(JOIN, address, once_more, RAY_AUTH_MODE="token")
        assert (joined.returncode, joined.stdout) == (0, "1.0\n1.0\n"), joined.stderr
        token: dict[str, Any] = {"RAY_AUTH_MODE": "token", "RAY_NUM_REDIS_GET_RETRIES": "1"}
        cases: list[tuple[dict[str, Any], str]] = [
            (token | {"RAY_AUTH_MODE": "disabled"}, "token is missing or incorrect; RAY_AUTH_MODE=token sends the token of "),
            (token | {"RAY_AUTH_TOKEN": "0" * 64}, "token is missing or incorrect; RAY_AUTH_MODE=token sends the token of "),
            (token | {"OTHER_VERSION": "2.59.0"}, "install the versions of the cluster here"),
        ]
        for environment, said in cases:
            refused = run_script(JOIN, address, **environment).stderr.splitlines()[-1]
            assert refused.startswith(f"RequestError: the Ray cluster at {address} cannot be joined: ")
            assert said in refused
    # The address of the cluster that was killed still lies there, and a new one is started.
    joined = run_script(JOIN, "")
    assert joined.stdout == f"{os.cpu_count():.1f}\n", joined.stderr


def session_of(process: int) -> int | None:
    """The session of a process that has not ended."""
    try:
        return None if psutil.Process(process).status() == psutil.STATUS_ZOMBIE else os.getsid(process)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def test_a_killed_driver_leaves_no_process(killed: set[int]) -> None:
    deadline = time.monotonic() + 100
    while left := [process for process in psutil.pids() if session_of(process) in killed]:
        assert time.monotonic() < deadline, [psutil.Process(process).cmdline() for process in left]
        time.sleep(0.2)
