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


@contextmanager
def new_home() -> Iterator[Path]:
    """A new home folder, which is also Ray's temporary folder. Its path is short because a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def home() -> Iterator[Path]:
    with new_home() as folder:
        yield folder


@pytest.fixture(scope="module", autouse=True)
def killed() -> Iterator[set[int]]:
    """The sessions of the processes that two drivers have left which were killed while Ray started, and later.

    They are killed before the other tests here: Ray's agents try for a minute to report that to the server that has ended.
    """
    code = "import time; from mnistsum_ray.cluster.connection import connect; connect(); time.sleep(60)"
    sessions = set[int]()
    with new_home():
        for moment in ("raylet/raylet", "ray::IDLE"):
            environment = os.environ | {"RAY_ADDRESS": "local"}
            driver = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, start_new_session=True)
            deadline = time.monotonic() + 120
            while not any(moment in title for title in descendants(driver.pid).values()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            sessions |= {os.getsid(process) for process in descendants(driver.pid)}
            driver.kill()
            driver.wait()
        yield sessions


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

for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    before = dict(os.environ)
    connect()
    assert before.items() <= os.environ.items(), "test_process_state looks at more"
    # The environment is restored by now, and tasks and actors must start nevertheless.
    ray.get(ray.remote(lambda: None).remote())
    print(ray.cluster_resources()["CPU"])
    disconnect()
"""


REFUSED = """
import sys, ray
from mnistsum_ray.cluster.connection import connect

ray.__version__ = sys.argv[1] or ray.__version__
try:
    connect()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_head_is_joined_by_its_address_where_a_token_lies(home: Path, mode: str) -> None:
    """The head asks for the token or for none. Another token is refused, as is another version of Ray. `ray.init` in this process
    would set RAY_AUTH_MODE for the client too."""
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with head(home, **({} if mode == "token" else {"RAY_AUTH_MODE": "disabled"})) as address:
        joined = run_script(JOIN, address, address.replace(address.rpartition(":")[0], "127.0.0.1"))
        assert (joined.returncode, joined.stdout, joined.stderr) == (0, "1.0\n1.0\n", "")
        other: dict[str, Any] = {"RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "1"} if mode == "token" else {}
        refused = run_script(REFUSED, "" if other else "2.59.0", RAY_ADDRESS=address, **other).stdout
        assert refused.startswith(f"the Ray cluster at {address} cannot be joined: ")
        wrong = "token is missing or incorrect; RAY_AUTH_TOKEN or" if other else "Ray: 2.59.0 Python: "
        assert wrong in refused
        assert refused.count("\n") == 1
    if mode == "disabled":  # the address of the cluster that was killed still lies there, and a new one is started
        joined = run_script(JOIN, "")
        assert joined.stdout == f"{os.cpu_count():.1f}\n", joined.stderr


START = """
import subprocess, sys
import ray
from mnistsum_ray.cluster.connection import connect, disconnect

connect()
address = ray.get_runtime_context().gcs_address
code = "import sys; from mnistsum_ray.cluster.ray_internals import rejects_this_client; print(rejects_this_client(sys.argv[1]))"
print("rejected:", subprocess.run([sys.executable, "-P", "-c", code, address], capture_output=True, text=True).stdout.strip())
jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info().values()
print("command:", *(job.entrypoint.split()[-1] for job in jobs))
print("worker:", ray.get(ray.remote(lambda: __import__("pandas").__name__).remote()))
disconnect(keep_logs=True)
"""


def test_a_cluster_that_is_started_keeps_to_itself(home: Path, tmp_path: Path) -> None:
    """Other programs of the machine meet no token of it and cannot join, it learns no key, and its workers run no module that
    lies beside the data."""
    (home / "ray" / "session_2026-01-01_00-00-00_000000_2").mkdir(parents=True)  # of another program
    for name in ("pandas", "numpy", "pyarrow"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write(__name__); raise ImportError")
    flags = ["--model", "s3://KEY:topsecret@bucket/runs"]
    done = run_script(START, *flags, cwd=tmp_path, RAY_ADDRESS="local", PYTHONBREAKPOINT="0")  # Ray changes it
    assert done.returncode == 0, done.stderr
    rejected, command, worker = done.stdout.splitlines()
    assert rejected == "rejected: True", "a client without the token"
    assert command == "command: s3://bucket/runs", "the dashboard shows its last word too"
    assert worker == "worker: pandas"
    assert not (tmp_path / "executed").exists()
    sessions = [path for path in (home / "ray").glob("session_2*") if not path.is_symlink()]
    assert len(sessions) == 2, "the other program's, and this one, whose logs were to be kept"
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if "token" in path.name or b"topsecret" in path.read_bytes()]


SIGNAL = """
import os, ray, signal, threading, time
from mnistsum_ray.cluster.connection import connect

def send_then(call):
    def made(*args, **kwargs):
        started = call(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return started
    return made

signal.signal(signal.SIGTERM, signal.default_int_handler)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # it may take the signal
ray._private.services.start_raylet = send_then(ray._private.services.start_raylet)
ray._raylet.CoreWorker = send_then(ray._raylet.CoreWorker)
try:
    connect()
except KeyboardInterrupt:
    time.sleep(4)
    print(ray.is_initialized())
"""


def test_a_signal_during_the_start_of_ray_is_delivered_after_it(home: Path) -> None:
    """CoreWorker installs a handler of C++ that aborts the process 3 s after the signal."""
    done = run_script(SIGNAL, RAY_ADDRESS="local")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


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
