"""Real clusters and real processes: one Ray cluster a module, and commands run as a person runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.mnist import SAMPLE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of two CPUs; commands join it through RAY_ADDRESS. Its address."""
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every n-th row of the bundled sample as one Parquet file; n is the module's EVERY."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pq.read_table(SAMPLE)[:: request.module.EVERY], path)
    return path


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def line(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        assert self.code == 0, self.err
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


class Job:
    """One of the jobs as a process."""

    def __init__(self, name: str, *args: object, address: str | None = None, cwd: Path | None = None) -> None:
        environment = dict(os.environ)
        environment["RAY_ADDRESS"] = address or "local"  # never a cluster that somebody else runs on this machine
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd or ROOT,
        )
        self._seen: list[str] = []

    def wait_for_line(self, beginning: str) -> None:
        """Read standard error up to a line that begins so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._seen.append(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"ended without {beginning!r}:\n" + "".join(self._seen))

    def wait(self, timeout: float = 240) -> Done:
        out, err = self.process.communicate(timeout=timeout)
        return Done(self.process.returncode, out, "".join(self._seen) + err, time.monotonic() - self._started)


def run_job(name: str, *args: object, address: str | None = None, cwd: Path | None = None) -> Done:
    return Job(name, *args, address=address, cwd=cwd).wait()


def descendants(root: int) -> dict[int, str]:
    """The living processes below `root`: their ids and titles."""
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
    """SIGKILL a process and all below it: the driver, the cluster it started, the workers."""
    below = descendants(root)
    for process in (root, *below):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_training_worker(root: int) -> None:
    """SIGKILL one training worker of the cluster below `root`."""
    workers = [process for process, title in descendants(root).items() if "RayTrainWorker" in title]
    assert workers, descendants(root)
    os.kill(workers[0], signal.SIGKILL)
