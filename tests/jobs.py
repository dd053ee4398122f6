"""Jobs as a person runs them: processes, what they leave, and how a test ends them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")


def default_signals() -> None:
    """Let a child process take signals that a shell ignores for `nohup` and for `&` in a script."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition that holds within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.05)


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


def end_jobs() -> None:
    """End what the test has started and not waited for."""
    for job in _jobs:
        if job.process.poll() is None:
            kill_everything(job.process.pid)
    _jobs.clear()


class Job:
    """A job that runs as a process: `jobs/NAME.py` with these arguments."""

    def __init__(
        self, name: str, *args: object, address: str | None = None, cwd: Path = ROOT
    ) -> None:
        environment = os.environ | {
            "RAY_ADDRESS": address or "local",  # never another cluster of this machine
            "PYTHONFAULTHANDLER": "1",  # a crash prints a traceback
        }
        self.process: Any = subprocess.Popen(
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

    def wait_for_line(self, beginning: str | tuple[str, ...]) -> str:
        """Read standard error to a line that begins so after the run's name; return the rest."""
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
            time.sleep(0.1)  # the job computes on the same cores

    def kill(self) -> None:
        """Send SIGKILL to the driver, the cluster that it started, and the workers."""
        kill_everything(self.process.pid)
        self.wait()

    def wait(self) -> Done:
        # `communicate` would lose the lines that `wait_for_line` has read ahead.
        self._seen += self.process.stderr
        out = self.process.stdout.read()
        return Done(self.process.wait(), out, "".join(self._seen))


def run_job(name: str, *args: object, **options: Any) -> Done:
    """Run a job to its end; the options are those of `Job`."""
    return Job(name, *args, **options).wait()


def training(data: object, runs: object, *flags: object) -> list[Any]:
    """Name and flags of a job: a training whose run is `mine`."""
    return ["train", "--data", data, "--storage-path", runs, "--name", "mine", *flags]


def scoring(model: object, source: object, output: object, *flags: object) -> list[Any]:
    """Name and flags of a job: a scoring."""
    return ["score", "--model", model, "--input", source, "--output", output, *flags]


def history_of(run: Path | str) -> list[dict[str, Any]]:
    """The lines of history.jsonl of a run, one an epoch."""
    return [json.loads(line) for line in Path(run, "history.jsonl").read_text().splitlines()]


def predictions_in(output: Location | Path) -> int:
    """Number of files of predictions in an output, which may not be there yet."""
    place = output if isinstance(output, Location) else locate(str(output), "--output")
    return sum(file.name[0] != "." for file in (place / "predictions").files())


def wait_for_files(job: Job, output: Location | Path, more: int) -> None:
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
