"""Real clusters and real processes: one Ray cluster for the tests here, and jobs run as commands."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from mnistsum_ray import cli
from mnistsum_ray.api import fit
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.errors import StorageError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.driver import score
from mnistsum_ray.scoring.request import preflight
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.conftest import default_signals

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
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            **resources,
        )
    assert ray.cluster_resources()["CPU"] == resources["num_cpus"], (
        "the test before has left another cluster"
    )
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


def lose_node(cluster: Cluster, *, notice: bool) -> None:
    """Kill a node, with the notice of 2 s that a cloud gives or without, and add another. The driver has joined the head."""
    node = cluster.list_all_nodes()[-1]
    if notice:
        command = [RAY, "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        command += [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
            "2",
        ]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(2)
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)


class Storage:
    """An S3 server on this machine that can answer 503 for a while, refuse some files, and be slow."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

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
            return [
                b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            ]
        status = next(
            (
                status
                for end, status in list(self.statuses.items())
                if environ["PATH_INFO"].endswith(end)
            ),
            None,
        )
        if status and environ["REQUEST_METHOD"] != "HEAD":
            self.refused += 1
            start_response(status, [("Content-Type", "application/xml")])
            return [b"<Error><Code>Refused</Code><Message>No.</Message></Error>"]
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and environ["PATH_INFO"].endswith(
            "/trainer.safetensors"
        ):
            time.sleep(self.write_seconds)  # of a checkpoint
        return self._app(environ, start_response)

    def overload(self, seconds: float) -> None:
        self._overloaded_until = time.monotonic() + seconds


@pytest.fixture(scope="package")
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
            boto3.client("s3").create_bucket(Bucket=bucket)
        yield storage
    storage.server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Parquet file with every n-th row of the bundled sample; n is EVERY in the test module."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pq.read_table(SAMPLE)[:: request.module.EVERY], path)
    return path


class Bomb:
    """Its pickle creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.pickled = pickle.dumps(self)
        pickle.loads(self.pickled)
        mark.unlink()  # it was there: the pickle works

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / "the pickle was executed")


def write_shuffled_sample(folder: Path, rows: int = 5000, **options: Any) -> Path:
    """Write rows of the sample, all digits mixed, as four Parquet files with row groups of 300 rows."""
    folder.mkdir()
    sample = pq.read_table(SAMPLE)
    table = sample.take(pa.array(np.random.default_rng(0).permutation(sample.num_rows)[:rows]))
    for index in range(4):
        part = table.slice(index * rows // 4, rows // 4)
        pq.write_table(part, folder / f"{index}.parquet", row_group_size=300, **options)
    return folder


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[bool]:
    """Mount a file system of this size on a folder; False where this user may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    may = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield may
    finally:
        if may:
            subprocess.run(["umount", str(folder)], check=True)


@dataclass
class Scored:
    """A finished scoring run in this process."""

    line: dict[str, Any]
    said: str
    output: Path

    def table(self, names: str = "**/*.parquet") -> pa.Table:
        """The predictions in the files of these names, in their order."""
        paths = sorted((self.output / "predictions").glob(names))
        # `pq.read_table` would also add columns from the names of the folders.
        return pa.concat_tables([pq.ParquetFile(path).read() for path in paths])

    def files(self) -> dict[str, dict[str, Any]]:
        rows = pq.read_table(self.output / "files.parquet").to_pylist()
        return {row["file"]: row for row in rows}

    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output / "manifest.json").read_text())
        return value


def score_here(
    model: Path | str, output: Path | str, *inputs: Path | str, **settings: Any
) -> Scored:
    """Score on this process's cluster: in float32, as plain PyTorch, with one worker, which starts soon."""
    stream = io.StringIO()
    given: dict[str, Any] = {"precision": "fp32", "num_workers": 1} | settings
    config = ScoreConfig(
        model=str(model), input=tuple(map(str, inputs)), output=str(output), **given
    )
    console = Console(stream)
    result = score(preflight(config, console), console)
    return Scored(result.line(labels=True), stream.getvalue(), Path(output))


@dataclass
class Trained:
    """A finished training in this process."""

    line: dict[str, Any]
    said: str

    def weights(self) -> bytes:
        return (Path(self.line["model"]) / "model.safetensors").read_bytes()


def train_here(**settings: Any) -> Trained:
    """Train on the cluster that this process is connected to."""
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    config = TrainConfig(**given)
    with redirect_stderr(io.StringIO()) as said:
        result = fit(config)
    return Trained(result.line(), said.getvalue())


@contextmanager
def polling(step: Callable[[], bool]) -> Iterator[None]:
    """Call `step` again and again, in a thread, while the block runs and until it returns True."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.05) and not step():
            pass

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def once(condition: Callable[[], object], action: Callable[[], object]) -> Iterator[None]:
    """Do something, in a thread, as soon as a condition holds; assert that it has been done."""
    done: list[object] = []

    def step() -> bool:
        if condition():
            done.append(action())
        return bool(done)

    with polling(step):
        yield
    assert done, "the block ended before"


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
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value

    @property
    def error(self) -> str:
        """The last line on standard error, which names the error; there is no other such line."""
        lines = self.err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        return lines[-1]


def history_of(run: Location | Path | str) -> list[dict[str, Any]]:
    """The lines of history.jsonl of a run, one an epoch; none before the first."""
    place = run if isinstance(run, Location) else locate(str(run), "--name")
    with suppress(StorageError):
        return [json.loads(line) for line in (place / "history.jsonl").read_bytes().splitlines()]
    return []


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
    """A job that runs as a process."""

    def __init__(
        self,
        name: str,
        *args: object,
        address: str | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        before: Callable[[], object] = default_signals,
    ) -> None:
        """Start `jobs/NAME.py`, or where there is none `mnistsum NAME`; `before` runs in the child process before exec."""
        environment = dict(os.environ) | (env or {})
        environment["RAY_ADDRESS"] = (
            address or "local"
        )  # never another cluster that runs on this machine
        self._mark = secrets.token_hex(8)
        environment |= {_MARK: self._mark, "PYTHONFAULTHANDLER": "1"}  # a crash prints a traceback
        self._started = time.monotonic()
        script = ROOT / "jobs" / f"{name}.py"
        command = [script] if script.exists() else ["-m", "mnistsum_ray", name]
        self.process = subprocess.Popen(
            [sys.executable, *map(str, (*command, *args))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd or ROOT,
            start_new_session=True,  # so that a signal can be sent to all of its processes and to none of the test's
            preexec_fn=before,
        )
        self._seen: list[str] = []
        _jobs.append(self)

    def wait_for_line(self, beginning: str) -> str:
        """Read standard error to a line with this beginning after the run's name; return the rest."""
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
        """Send SIGKILL to the driver, the cluster that it started, and the workers; wait for their end."""
        kill_everything(self.process.pid)
        self.wait()

    def left(self) -> list[str]:
        """Return the command lines of the living processes that the job has started, and of its own."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if (
                    process.environ().get(_MARK) == self._mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(" ".join(process.cmdline())[:100])
        return found

    def wait(self, timeout: float = 400) -> Done:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_everything(self.process.pid)  # it would slow down all tests that follow
            raise
        return Done(
            self.process.returncode,
            out,
            "".join(self._seen) + err,
            time.monotonic() - self._started,
        )


def wait_for_files(job: Job, output: Location | Path, more: int) -> None:
    """Wait until a running job has written so many more files of predictions."""
    place = locate(str(output), "--output") if isinstance(output, Path) else output

    def written() -> int:
        return sum("/predictions/" in file.path for file in place.files() if file.name[0] != ".")

    before = written()
    job.wait_until(lambda: written() >= before + more)


def run_job(name: str, *args: object, **options: Any) -> Done:
    """Run a job to its end; the options are those of `Job`."""
    return Job(name, *args, **options).wait()


def run_warm(
    commands: list[list[str]], cwd: Path, processes: int = 1, **environment: str
) -> list[tuple[int, str]]:
    """Run `mnistsum COMMAND FLAGS` for each, in forks of one process that has imported the packages, so many at a time.

    Returns the exit codes, and all that was written.
    """
    forks = multiprocessing.get_context("forkserver")
    packages = [
        "mnistsum_ray.api",
        "mnistsum_ray.predicting",
        "mnistsum_ray.export.model",
        "ray.train.torch",
    ]
    forks.set_forkserver_preload(packages)
    with forks.Pool(processes, maxtasksperchild=1) as pool:
        requests = [(command, os.environ | environment, cwd) for command in commands]
        return pool.starmap(_run_fork, requests, chunksize=1)


def _run_fork(command: list[str], environment: dict[str, str], cwd: Path) -> tuple[int, str]:
    # The process that is forked may be a test's that came before, with another environment.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with tempfile.TemporaryFile() as written:
        for stream in (1, 2):
            os.dup2(written.fileno(), stream)
        try:
            code = cli.main(command)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = -1
        sys.stdout.flush()
        sys.stderr.flush()
        written.seek(0)
        return code, written.read().decode()


def descendants(root: int) -> dict[int, str]:
    """Return id and command line of each living descendant of the process `root`."""
    found: dict[int, str] = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(root).children(recursive=True):
            with suppress(psutil.Error):
                found[process.pid] = " ".join(process.cmdline()).strip()
    return found


def kill_everything(root: int) -> None:
    """Send SIGKILL to a process and all its descendants: the driver, the cluster that it started, the workers."""
    for process in (root, *descendants(root)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


TRAIN = "RayTrainWorker"
"""A part of the title of a training worker."""


def kill_worker(root: int, title: str) -> None:
    """Send SIGKILL to one descendant of `root` whose title contains this text."""
    workers = [process for process, line in descendants(root).items() if title in line]
    assert workers, descendants(root)
    os.kill(workers[0], signal.SIGKILL)
