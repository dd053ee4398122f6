"""Real clusters and real processes: one Ray cluster for the tests here, and jobs as commands."""

import io
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from ray.cluster_utils import Cluster

from mnistsum_ray import ScoreConfig, TrainConfig, fit, score
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.conftest import default_signals
from tests.storage.conftest import ask, serving

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def cluster(s3: "Storage") -> str:
    """The address of a Ray cluster of two CPUs, to which this process is connected.

    It runs until a test needs another one and calls `ray.shutdown`: a start costs six seconds. Its
    processes know the S3 server.
    """
    return start_cluster(num_cpus=2)


def start_cluster(**resources: int) -> str:
    """Start a cluster unless this process is connected to one; return its address."""
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        ray.init(address="local", include_dashboard=False, **quiet, **resources)
    found = ray.cluster_resources()["CPU"]
    assert found == resources["num_cpus"], "the test before has left another cluster"
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="package", autouse=True)
def no_cluster_is_left() -> Iterator[None]:
    yield
    ray.shutdown()


_NODE = {"object_store_memory": 200 * 2**20, "include_dashboard": False}
_hosts = itertools.count(2)


def add_node(cluster: Cluster, cpus: int = 1) -> None:
    """Add a node with its own address: of nodes with one, a job may join any, also a killed one."""
    cluster.add_node(num_cpus=cpus, node_ip_address=f"127.0.0.{next(_hosts)}", **_NODE)


@contextmanager
def nodes(*cpus: int) -> Iterator[Cluster]:
    """A cluster of raylets on this machine with so many CPUs each; the first is the head."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **_NODE})
    try:
        for count in cpus[1:]:
            add_node(started, count)
        started.wait_for_nodes()
        yield started
    finally:
        started.shutdown()


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Connect this process to a cluster, and from none to none."""
    ray.shutdown()
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


class Storage:
    """An S3 server on this machine that can answer 503 for a while."""

    def __init__(self) -> None:
        self._overloaded_until = 0.0
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if time.monotonic() >= self._overloaded_until:
            return self._app(environ, start_response)
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Not now.</Message></Error>"]

    def overload(self, seconds: float) -> None:
        self._overloaded_until = time.monotonic() + seconds


@pytest.fixture(scope="package")
def s3() -> Iterator[Storage]:
    """An S3 server with the bucket `bucket`, which the environment names for jobs."""
    storage = Storage()
    with serving(storage) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        ask(port, "PUT", "/bucket")
        yield storage


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Parquet file with 1,000 rows of the bundled sample, all digits alike."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pq.read_table(SAMPLE)[::5], path)
    return path


@dataclass
class Result:
    """What a job in this process has returned, and said."""

    line: dict[str, Any]
    said: str

    def weights(self) -> bytes:
        """Those that a training has written."""
        model = locate(self.line["model"], "--model")
        return bytes((model / "model.safetensors").read_bytes())


def score_here(
    model: Path | str, output: Path | str, *inputs: Path | str, **settings: Any
) -> Result:
    """Score on this process's cluster: in float32, as plain PyTorch, with one worker."""
    given: dict[str, Any] = {"precision": "fp32", "num_workers": 1} | settings
    paths = tuple(map(str, inputs))
    config = ScoreConfig(model=str(model), input=paths, output=str(output), **given)
    with redirect_stderr(io.StringIO()) as said:
        result = score(config)
    return Result(result.model_dump(), said.getvalue())


def train_here(**settings: Any) -> Result:
    """Train on the cluster that this process is connected to."""
    for name, value in settings.items():
        settings[name] = str(value) if isinstance(value, Path) else value
    with redirect_stderr(io.StringIO()) as said:
        result = fit(TrainConfig(**settings))
    return Result(result.model_dump(), said.getvalue())


@dataclass
class Done:
    """A finished job."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output of a job that has succeeded."""
        assert self.code == 0, self.err
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


_jobs: "list[Job]" = []
"""Jobs that the test has started."""


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """A test that fails leaves no job on the CPUs of the tests that follow."""
    yield
    for job in _jobs:
        if job.process.poll() is None:
            kill_everything(job.process.pid)
    _jobs.clear()


_MARK = "MNISTSUM_TEST"
"""Environment variable that all processes of a job inherit."""


class Job:
    """A job that runs as a process: `jobs/NAME.py` with these arguments."""

    def __init__(
        self, name: str, *args: object, address: str | None = None, cwd: Path = ROOT
    ) -> None:
        self._mark = secrets.token_hex(8)
        environment = os.environ | {
            "RAY_ADDRESS": address or "local",  # never another cluster of this machine
            "PYTHONFAULTHANDLER": "1",  # a crash prints a traceback
            _MARK: self._mark,
        }
        self.process = subprocess.Popen(
            [sys.executable, *map(str, (ROOT / "jobs" / f"{name}.py", *args))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # a signal reaches all of its processes, and none of the test's
            preexec_fn=default_signals,
        )
        self._seen: list[str] = []
        _jobs.append(self)

    def wait_for_line(self, beginning: str) -> str:
        """Read standard error to a line that begins so after the run's name; return the rest."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._seen.append(line)
            said = re.sub(r"^[0-9:]{8} \S+  ", "", line)
            if said.startswith(beginning):
                return said
        raise AssertionError(f"ended without {beginning!r}:\n" + "".join(self._seen))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition that holds before the job ends."""
        while not condition():
            assert self.process.poll() is None, self.wait().err
            time.sleep(0.05)

    def kill(self) -> None:
        """Send SIGKILL to the driver, the cluster that it started, and the workers."""
        kill_everything(self.process.pid)
        self.wait()

    def left(self) -> list[str]:
        """Command lines of the living processes that the job has started, and of its own."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and process.environ().get(_MARK) == self._mark:
                    found.append(" ".join(process.cmdline())[:100])
        return found

    def wait(self) -> Done:
        out, err = self.process.communicate(timeout=400)
        return Done(self.process.returncode, out, "".join(self._seen) + err)


def run_job(name: str, *args: object, **options: Any) -> Done:
    """Run a job to its end; the options are those of `Job`."""
    return Job(name, *args, **options).wait()


def history_of(run: Path | str) -> list[dict[str, Any]]:
    """The lines of history.jsonl of a run, one an epoch."""
    return [json.loads(line) for line in Path(run, "history.jsonl").read_text().splitlines()]


def predictions_in(output: Location | Path) -> int:
    """Number of files of predictions in an output, which may not be there yet."""
    place = output if isinstance(output, Location) else locate(str(output), "--output")
    return sum(file.name[0] != "." for file in (place / "predictions").files())


def wait_for_files(job: Job, output: Path, more: int) -> None:
    """Wait until a running job has written so many more files of predictions."""
    before = predictions_in(output)
    job.wait_until(lambda: predictions_in(output) >= before + more)


def descendants(root: int) -> dict[int, str]:
    """Return id and command line of each living descendant of the process `root`."""
    found: dict[int, str] = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with suppress(psutil.Error):
                found[process.pid] = " ".join(process.cmdline()).strip()
    return found


def kill_everything(root: int) -> None:
    """Send SIGKILL to a process and all its descendants: driver, cluster and workers."""
    for process in (root, *descendants(root)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_worker(root: int, title: str) -> None:
    """Send SIGKILL to one descendant of `root` whose title contains this text."""
    workers = [process for process, line in descendants(root).items() if title in line]
    assert workers, descendants(root)
    os.kill(workers[0], signal.SIGKILL)
