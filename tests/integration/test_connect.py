"""Connect to clusters with a token, without one, or killed, and to servers that are no cluster."""

import functools
import http.server
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mnistsum_ray.data.sources import SAMPLE
from tests.integration.conftest import RAY, ROOT, descendants, kill_everything, run_job

JOIN = """
import logging, os, ray, signal
from mnistsum_ray.cluster.connection import connect, disconnect

def snapshot():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return [os.getcwd(), *handlers, logging.getLogger("ray").level, {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}]

before = snapshot()
for _ in range(int(os.environ.get("CONNECTIONS", "1"))):
    connect()
    assert snapshot() == before, (before, snapshot())
    # The environment is restored by now, and tasks and actors must start nevertheless.
    ray.get(ray.remote(lambda: None).remote())
    cpus = ray.cluster_resources()["CPU"]
    disconnect()
print(cpus)
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new home folder, which is also Ray's temporary folder. Its path is short because a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", folder)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


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
        deadline = time.monotonic() + 60
        while not address_file.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        yield address_file.read_text().strip()
    finally:
        kill_everything(process.pid)
        process.wait(timeout=30)


def join(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", JOIN], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_head_is_joined_by_its_address_where_a_token_lies(home: Path, mode: str) -> None:
    """The head asks for the token or for none. `ray.init` in this process would set RAY_AUTH_MODE for the client too."""
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    with head(home, **({} if mode == "token" else {"RAY_AUTH_MODE": "disabled"})) as address:
        for name in (address, address.replace(address.rpartition(":")[0], "127.0.0.1")):
            joined = join(RAY_ADDRESS=name, CONNECTIONS="2")
            assert (joined.returncode, joined.stdout) == (0, "1.0\n"), joined.stderr
            assert not joined.stderr
    if mode == "disabled":  # the address of the cluster that was killed still lies there, and a new one is started
        joined = join()
        assert float(joined.stdout) == os.cpu_count(), joined.stderr


NOWHERE = {
    "127.0.0.1:9": "no cluster answers there; correct it, or unset it to start one here",
    "nowhere.invalid:6379": "no cluster answers there",
    "ray://127.0.0.1:10001": "must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`",
    "http://127.0.0.1:8265": "must be HOST:PORT",
    "127.0.0.1": "must be HOST:PORT",
    "127.0.0.1:99999": "must be HOST:PORT",
}

JOIN_EACH = """
import os, sys
from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.errors import RequestError

for os.environ["RAY_ADDRESS"] in sys.argv[1:]:
    try:
        connect()
    except RequestError as error:
        print(error)
"""


def test_addresses_where_no_cluster_is() -> None:
    done = subprocess.run([sys.executable, "-c", JOIN_EACH, *NOWHERE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line, (address, said) in zip(done.stdout.splitlines(), NOWHERE.items(), strict=True):
        assert line.startswith(f"RAY_ADDRESS={address}: {said}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["HTTP server", "silent server"])
def stranger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a server that is no cluster."""
    if request.param == "silent server":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_that_is_no_cluster_is_refused_in_seconds(stranger: str, tmp_path: Path) -> None:
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, address=stranger)
    done.check_refused(f"error: RAY_ADDRESS={stranger}: no cluster answers there")


ASK_WITHOUT_THE_TOKEN = """
import subprocess, sys
from mnistsum_ray.cluster.connection import connect
connect()
import ray
code = "import sys; from mnistsum_ray.cluster.ray_internals import rejects_this_client; print(rejects_this_client(sys.argv[1]))"
address = ray.get_runtime_context().gcs_address
sys.exit(subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True).stdout != "True\\n")
"""


@pytest.mark.slow
def test_a_cluster_of_a_job_has_a_token_that_no_other_program_meets(home: Path) -> None:
    """In the home folder, each cluster that the user starts later would ask for it. That folder may also be read-only."""
    for folder, connections in (("/proc/nowhere", "1"), (str(home), "2")):
        joined = join(HOME=folder, RAY_ADDRESS="local", CONNECTIONS=connections, PYTHONBREAKPOINT="0")  # Ray changes it
        assert float(joined.stdout) == os.cpu_count(), joined.stderr
        assert not joined.stderr
    asked = subprocess.run([sys.executable, "-c", ASK_WITHOUT_THE_TOKEN], env=os.environ | {"RAY_ADDRESS": "local"}, cwd=ROOT)
    assert asked.returncode == 0, "a client without the token is rejected"
    assert not (home / ".ray").exists()
    assert not [path for path in home.rglob("*token*") if path.is_file()]


IN_A_THREAD = """
import threading, time
from mnistsum_ray.cluster.connection import connect
thread = threading.Thread(target=connect)
thread.start()
thread.join()
time.sleep(1)
import ray
print(ray.get(ray.remote(lambda: "answered").remote(), timeout=30))
"""


@pytest.mark.slow
def test_a_cluster_outlives_the_thread_that_has_started_it(home: Path) -> None:
    """Ray has the kernel end its processes with the thread that has started them; the next call then hangs."""
    command, environment = [sys.executable, "-c", IN_A_THREAD], os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


ENTRYPOINTS = """
from mnistsum_ray.cluster.connection import connect
connect()
import ray
print(*(job.entrypoint for job in ray._private.worker.global_worker.gcs_client.get_all_job_info().values()))
"""


@pytest.mark.slow
def test_the_cluster_does_not_learn_the_keys_of_the_command_line(home: Path) -> None:
    """The dashboard shows the command line of each job."""
    command = [sys.executable, "-c", ENTRYPOINTS, "--model", "s3://KEY:topsecret@bucket/runs"]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "bucket/runs" in done.stdout, done.stderr
    assert "topsecret" not in done.stdout
    logs = [path for path in home.rglob("session_*/**/*") if path.is_file()]
    assert logs
    assert not [path for path in logs if b"topsecret" in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["raylet/raylet", "ray::IDLE"], ids=["while Ray starts", "later"])
def test_a_killed_driver_leaves_no_process(home: Path, moment: str) -> None:
    """Ray's main processes end with the driver. Its agents try for a minute to report that to the server that has ended."""
    code = "import time; from mnistsum_ray.cluster.connection import connect; connect(); time.sleep(60)"
    environment = os.environ | {"RAY_ADDRESS": "local"}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(moment in title for title in descendants(driver.pid).values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sessions = {os.getsid(process) for process in descendants(driver.pid)}
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 100
    while left := [process for process in psutil.pids() if session_of(process) in sessions]:
        assert time.monotonic() < deadline, [psutil.Process(process).cmdline() for process in left]
        time.sleep(0.2)


def session_of(process: int) -> int | None:
    """The session of a process that has not ended."""
    try:
        return None if psutil.Process(process).status() == psutil.STATUS_ZOMBIE else os.getsid(process)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_or_without_write_permission_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 40)
    deep.mkdir(parents=True)
    flags = ["--data", "sample", "--storage-path", tmp_path / "runs"]
    for name, folder, said in (
        ("TMPDIR", str(deep), "has too long a path for Ray's sockets; set RAY_TMPDIR=/tmp"),
        ("RAY_TMPDIR", "/proc", "the temporary folder /proc cannot be written ("),
    ):
        run_job("train", *flags, env={name: folder}).check_refused(said)


def test_a_process_that_may_open_few_files_is_refused(tmp_path: Path) -> None:
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    done = run_job("train", "--data", "sample", "--storage-path", tmp_path, before=few)
    done.check_refused("error: this process may open just 64 files, and Ray needs more: ulimit -n 8192")


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
{call} = send_then({call})
try:
    connect()
except KeyboardInterrupt:
    time.sleep(4)
    print(ray.is_initialized())
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["ray._private.services.start_raylet", "ray._raylet.CoreWorker"])
def test_a_signal_during_the_start_of_ray_is_delivered_after_it(home: Path, call: str) -> None:
    """CoreWorker installs a handler of C++ that aborts the process 3 s after the signal."""
    code, environment = SIGNAL.format(call=call), os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.slow
def test_the_session_of_a_cluster_is_deleted_after_a_good_end(home: Path, model: Path, tmp_path: Path) -> None:
    """Ray keeps a megabyte and more of each cluster."""
    (home / "ray" / "session_2026-01-01_00-00-00_000000_2").mkdir(parents=True)  # of another program
    flags = ["--model", model, "--input", SAMPLE, "--number-column", "digit", "--output", tmp_path / "out"]
    assert run_job("score", *flags).line["scored_rows"] == 5000
    assert [path.name[8:18] for path in (home / "ray").glob("session_2*") if not path.is_symlink()] == ["2026-01-01"]
