"""One Ray cluster for the tests here, clusters of several nodes, an S3 server, and jobs on them."""

import io
import itertools
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import ray
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from ray.cluster_utils import Cluster

from mnistsum_ray import ScoreConfig, TrainConfig, fit, score
from mnistsum_ray.storage.uri import locate
from tests.conftest import write_sample
from tests.storage.conftest import ask, serving


@pytest.fixture(scope="module")
def cluster(s3_server: "S3Server") -> Iterator[str]:
    """The address of a Ray cluster of two CPUs, to which this process is connected.

    It runs until a test needs another one and calls `ray.shutdown`: a start costs six seconds. Its
    processes know the S3 server. Trainings do without two processes of Ray Train that they have on
    other people's clusters; test_faults.py and test_connect.py have them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield start_cluster(num_cpus=2)


def start_cluster(**resources: int) -> str:
    """Start a cluster unless this process is connected to one; return its address."""
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        # Tests wait for metrics; Ray's default is ten seconds.
        options["_system_config"] = {"metrics_report_interval_ms": 2000}
        ray.init(address="local", include_dashboard=False, **options, **resources)
    found = ray.cluster_resources()["CPU"]
    assert found == resources["num_cpus"], "the test before has left another cluster"
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="session", autouse=True)
def no_cluster_is_left() -> Iterator[None]:
    """At the end of all tests: others may use the one that is there."""
    yield
    ray.shutdown()


_NODE = {"object_store_memory": 200 * 2**20, "include_dashboard": False}
_hosts = itertools.count(2)


def add_node(cluster: Cluster, cpus: int = 2) -> None:
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


class S3Server:
    """An S3 server on this machine that can answer 503 for a while."""

    def __init__(self) -> None:
        self.refused = 0
        """Requests that were answered so."""
        self._overloaded_until = 0.0
        self._app = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if time.monotonic() >= self._overloaded_until:
            return self._app(environ, start_response)
        self.refused += 1
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Not now.</Message></Error>"]

    def overload(self, seconds: float) -> None:
        self._overloaded_until = time.monotonic() + seconds


@pytest.fixture(scope="package")
def s3_server() -> Iterator[S3Server]:
    """An S3 server with the bucket `bucket`, which the environment names for jobs."""
    server = S3Server()
    with serving(server) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        ask(port, "PUT", "/bucket")
        yield server


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Parquet file with 1,000 rows of the bundled sample, all digits alike."""
    return write_sample(tmp_path_factory.mktemp("data") / "rows.parquet", 1000)


@dataclass
class Result:
    """What a job in this process has returned, and said."""

    line: dict[str, Any]
    """The JSON line of its command."""
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
    return Result(result.line(), said.getvalue())


def train_here(**settings: Any) -> Result:
    """Train on the cluster that this process is connected to."""
    for name, value in settings.items():
        settings[name] = str(value) if isinstance(value, Path) else value
    with redirect_stderr(io.StringIO()) as said:
        result = fit(TrainConfig(**settings))
    return Result(result.line(), said.getvalue())


def metrics_of(folder: str) -> dict[str, float]:
    """Prometheus metrics of the job with this run or output folder, summed over its processes."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    token = (Path.home() / ".ray" / "auth_token").read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        if line.startswith("ray_mnistsum") and f'run="{quote(folder)}"' in line:
            found[re.split(r"[{ ]", line)[0]] += float(line.rsplit(" ", 1)[1])
    return found
