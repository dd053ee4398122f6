"""Real clusters and real processes: one Ray cluster per test module, and jobs run as commands."""

import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from ray.cluster_utils import Cluster
from werkzeug.serving import make_server

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.driver import score
from mnistsum_ray.scoring.preflight import preflight
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from tests.conftest import default_signals

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")

_DURATIONS: list[str] = []


def report_duration(what: str, since: float) -> None:
    """Add the time since `since` to the summary that pytest prints at the end."""
    _DURATIONS.append(f"{what} after {time.monotonic() - since:.1f} s")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _DURATIONS:
        terminalreporter.section("recovery times")
        for line in _DURATIONS:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a Ray cluster of two CPUs and yield its address. Jobs join it through RAY_ADDRESS."""
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context.address_info["address"]
    ray.shutdown()


_NODE = {"object_store_memory": 200 * 2**20, "include_dashboard": False}


def add_node(cluster: Cluster, cpus: int = 1) -> None:
    cluster.add_node(num_cpus=cpus, **_NODE)


@contextmanager
def nodes(*cpus: int) -> Iterator[Cluster]:
    """Start a cluster of several raylets on this machine, each with this number of CPUs. The first is the head."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **_NODE})
    try:
        for count in cpus[1:]:
            add_node(started, count)
        started.wait_for_nodes()
        yield started
    finally:
        started.shutdown()


def lose_node(cluster: Cluster, *, notice: bool) -> None:
    """Kill a node, with the notice of 2 s that a cloud gives or without, and add another. The driver has joined the head."""
    node = cluster.list_all_nodes()[-1]
    if notice:
        command = [RAY, "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "2"]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(2)
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)


@dataclass
class Head:
    """A head started by `ray start`."""

    folder: Path
    """Home folder, and the folder where the head was started."""
    environment: dict[str, str]
    """Environment of a client, with the address and the token mode."""

    def submit(self, *command: str, working_dir: Path | None = None) -> tuple[subprocess.CompletedProcess[str], int]:
        """Run `ray job submit`; return its result and the exit code of the job itself."""
        job = f"job-{secrets.token_hex(4)}"
        where = ["--submission-id", job, *(["--working-dir", str(working_dir)] if working_dir else [])]
        submit: list[Path | str] = [RAY, "job", "submit", *where, "--", *command]
        done = subprocess.run(submit, env=self.environment, capture_output=True, text=True, timeout=240)
        code = (
            "import sys; from ray.job_submission import JobSubmissionClient; "
            "print(JobSubmissionClient().get_job_info(sys.argv[1]).driver_exit_code)"
        )
        ask = [sys.executable, "-c", code, job]
        asked = subprocess.run(ask, env=self.environment, capture_output=True, text=True, check=True)
        return done, int(asked.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Start a head on free ports, with its own home folder and token."""
    with tempfile.TemporaryDirectory(prefix="h") as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        here = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        here |= {"HOME": name, "RAY_TMPDIR": name, "PATH": f"{RAY.parent}:{here['PATH']}"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=here, check=True, capture_output=True)
        command: list[Path | str] = [RAY, "start", "--head", "--block", "--port=0", f"--dashboard-port={port}", "--num-cpus=2"]
        process = subprocess.Popen(command, env=here, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            client = here | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": f"http://127.0.0.1:{port}"}
            deadline = time.monotonic() + 120
            # The dashboard lists jobs before the agent that starts them is ready.
            while subprocess.run([RAY, "job", "submit", "--no-wait", "--", "true"], env=client, capture_output=True).returncode:
                assert time.monotonic() < deadline
                assert process.poll() is None
            yield Head(folder, client)
        finally:
            kill_everything(process.pid)
            process.wait(timeout=30)


class Storage:
    """An S3 server on this machine that can answer 503 for a while, refuse some files, and be slow."""

    def __init__(self) -> None:
        self._overloaded_until = 0.0
        self.write_seconds = 0.0
        self.refused = 0
        self.statuses: dict[str, str] = {}
        """Answer to each request to read or write a path that ends so: `403 Forbidden`."""
        self._app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)

    def _answer(self, environ: Any, start_response: Any) -> Any:
        if time.monotonic() < self._overloaded_until:
            self.refused += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        status = next((status for end, status in self.statuses.items() if environ["PATH_INFO"].endswith(end)), None)
        if status and environ["REQUEST_METHOD"] != "HEAD":
            self.refused += 1
            start_response(status, [("Content-Type", "application/xml")])
            return [b"<Error><Code>Refused</Code><Message>No.</Message></Error>"]
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and environ["PATH_INFO"].endswith("/trainer.safetensors"):
            time.sleep(self.write_seconds)  # of a checkpoint
        return self._app(environ, start_response)

    def overload(self, seconds: float) -> None:
        self._overloaded_until = time.monotonic() + seconds


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    """An S3 server with the buckets `images`, `runs` and `scores`. Environment variables name it for the jobs."""
    storage = Storage()
    thread = threading.Thread(target=storage.server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{storage.server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for bucket in ("images", "runs", "scores"):
            locate(f"s3://{bucket}?allow_bucket_creation=true", "bucket").filesystem.create_dir(bucket)
        yield storage
    storage.server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Parquet file with every n-th row of the bundled sample; n is EVERY in the test module."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pq.read_table(SAMPLE)[:: request.module.EVERY], path)
    return path


@dataclass
class Scored:
    """A finished scoring run in this process."""

    line: dict[str, Any]
    set_aside: bool
    """Whether the run set rows or files aside that no earlier run had set aside."""
    said: str
    output: Path

    @property
    def complete(self) -> bool:
        return not self.line["rejected_rows"] and not self.line["failed_files"]

    def table(self, name: str, folder: str = "predictions") -> pa.Table:
        # `pq.read_table` would also add columns from the names of the folders.
        return pq.ParquetFile(self.output / folder / name).read()

    def files(self) -> dict[str, dict[str, Any]]:
        return {row["file"]: row for row in self.table("files.parquet", "").to_pylist()}

    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return value


def score_here(model: Path, output: Path, *inputs: Path | str, **settings: Any) -> Scored:
    """Score on the cluster that this process is connected to, in float32, which gives the same results as plain PyTorch."""
    stream = io.StringIO()
    settings = {"precision": "fp32"} | settings
    config = ScoreConfig(model=str(model), input=tuple(map(str, inputs)), output=str(output), **settings)
    line, set_aside = score(preflight(config), Console(stream))
    return Scored(line, set_aside, stream.getvalue(), output)


@dataclass
class Done:
    """A finished job."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def line(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output of a job that has succeeded."""
        assert self.code == 0, self.err
        return self.last_line

    @property
    def last_line(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output, for any exit code."""
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


class Job:
    """A job that runs as a process."""

    def __init__(
        self, name: str, *args: object, address: str | None = None, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        environment = dict(os.environ) | (env or {})
        environment["RAY_ADDRESS"] = address or "local"  # never another cluster that runs on this machine
        self._mark = f"MNISTSUM_TEST={secrets.token_hex(8)}"  # inherited by all processes that the job starts
        environment |= dict([self._mark.split("=")]) | {"PYTHONFAULTHANDLER": "1"}  # a crash prints a traceback
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd or ROOT,
            start_new_session=True,  # so that a signal can be sent to all of its processes and to none of the test's
            preexec_fn=default_signals,
        )
        self._seen: list[str] = []

    def wait_for_line(self, beginning: str) -> None:
        """Read standard error up to a line that begins with this text."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._seen.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"ended without {beginning!r}:\n" + "".join(self._seen))

    def left(self) -> list[str]:
        """Return the titles of the living processes that the job has started, and of its own."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                marked = self._mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                if marked and b") Z " not in (entry / "stat").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100].strip())
            except OSError:
                continue
        return found

    def check_nothing_left(self, seconds: float = 0) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left

    def wait(self, timeout: float = 240) -> Done:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_everything(self.process.pid)  # it would slow down all tests that follow
            raise
        return Done(self.process.returncode, out, "".join(self._seen) + err, time.monotonic() - self._started)


def wait_for_files(job: Job, output: Location | Path, more: int) -> None:
    """Wait until a running job has written so many more files of predictions."""
    folder = output if isinstance(output, Location) else locate(str(output), "--output")

    def count() -> int:
        return len([info for info in folder.files() if "/predictions/" in info.path and not info.base_name.startswith(".")])

    before = count()
    while count() < before + more:
        assert job.process.poll() is None, job.wait().err
        time.sleep(0.05)


def run_job(
    name: str, *args: object, address: str | None = None, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Done:
    return Job(name, *args, address=address, cwd=cwd, env=env).wait()


def descendants(root: int) -> dict[int, str]:
    """Return id and title of each living descendant of the process `root`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root and process != root:
            found[process] = titles[process]
    return found


def kill_everything(root: int) -> None:
    """Send SIGKILL to a process and all its descendants: the driver, the cluster that it started, the workers."""
    for process in (root, *descendants(root)):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_worker(root: int, title: str) -> None:
    """Send SIGKILL to one descendant of `root` whose title contains this text."""
    workers = [process for process, process_title in descendants(root).items() if title in process_title]
    assert workers, descendants(root)
    os.kill(workers[0], signal.SIGKILL)
