"""Join clusters with a token, without one, or killed; start a cluster, and leave nothing of it."""

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
    # The environment is restored by now, and tasks and actors must start nevertheless.
    ray.get(ray.remote(lambda: None).remote())
    print(ray.cluster_resources()["CPU"])
    disconnect()
"""


def test_a_head_with_a_token_is_joined_by_its_address(home: Path) -> None:
    """Another token is refused, as is another version of Ray. `ray.init` in this process would set RAY_AUTH_MODE for the client
    too."""
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with head(home) as address:
        joined = run_script(JOIN, address, address.replace(address.rpartition(":")[0], "127.0.0.1"))
        assert (joined.returncode, joined.stdout, joined.stderr) == (0, "1.0\n1.0\n", "")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "1"}, "token is missing or incorrect; RAY_AUTH_TOKEN or"),
            ({"OTHER_VERSION": "2.59.0"}, "Ray: 2.59.0 Python: "),
        ]
        for environment, said in cases:
            refused = run_script(JOIN, address, **environment)
            assert f"the Ray cluster at {address} cannot be joined: " in refused.stderr
            assert said in refused.stderr
            assert refused.stderr.count("\n") == 1
    # The address of the cluster that was killed still lies there, and a new one is started.
    joined = run_script(JOIN, "")
    assert joined.stdout == f"{os.cpu_count():.1f}\n", joined.stderr


START = """
import ray
from mnistsum_ray.cluster.connection import connect, disconnect

connect()
print(ray.get(ray.remote(lambda: __import__("pandas").__name__).remote()))
disconnect(keep_logs=True)
"""


def test_a_cluster_that_is_started_keeps_to_itself(tmp_path: Path) -> None:
    """Other programs of the machine meet no token of it, it learns no key, and its workers run no module that lies beside the
    data."""
    for name in ("pandas", "numpy", "pyarrow"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write(__name__); raise ImportError")
    flags = ["--model", "s3://KEY:topsecret@bucket/runs"]
    with tempfile.TemporaryDirectory(prefix="r") as name:
        done = run_script(START, *flags, cwd=tmp_path, RAY_ADDRESS="local", HOME=name, RAY_TMPDIR=name)
        assert (done.returncode, done.stdout) == (0, "pandas\n"), done.stderr
        assert not (tmp_path / "executed").exists()
        files = [path for path in Path(name).rglob("*") if path.is_file()]
        assert len(files) > 10, "the logs were to be kept"
        assert not [path for path in files if "token" in path.name or b"topsecret" in path.read_bytes()]


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
