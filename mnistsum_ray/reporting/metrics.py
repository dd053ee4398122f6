"""Figures of a running job for Ray's dashboard and its Prometheus endpoint, by `ray.util.metrics`.

Ray puts `ray_mnistsum_` in front of the names, and `_total` behind those of counters. A job that ends hands on its last values.
Its node then keeps the counters as long as Ray runs there, and the gauges for 20 s.
"""

import threading
import time
from contextlib import suppress
from typing import Any, Final, Self

import ray
from ray.util.metrics import Counter, Gauge

COUNTERS: Final = {
    "jobs_started": "Jobs that have joined the cluster.",
    "jobs_ended": "Jobs that have ended, in any way but by SIGKILL.",
    "jobs_failed": "Jobs that have ended with an error. One that a signal stopped has not.",
    "rows": "Training rows, all epochs and workers together; scored rows whose file is written, rejected ones included.",
    "rejected_rows": "Rows that cannot be scored.",
    "failed_files": "Input files that cannot be used.",
    "restarts": "Times that workers were started again after a failure.",
    "lost_nodes": "Nodes that crashed or were preempted while the job ran.",
}
GAUGES: Final = {
    "phase_seconds": "Time in the phase that the tag `phase` names.",
    "checkpoint_age_seconds": "Time since the last checkpoint, or since the start of the job.",
    "rows_expected": "Rows that the job will have counted when it is done.",
    "rows_per_second": "Rate, all workers together.",
    "epoch": "Epoch that is trained, from 1.",
    "loss": "Mean loss a row of this epoch, in nats.",
}

_LOST: Final = (2, 3)
"""`DeathReason` of a node that crashed, and of one that was preempted: Ray's own count has the idle nodes that leave, too."""

_REFRESH_SECONDS: Final = 5.0
"""Ray reports every 10 s, and leaves out gauges that have not been set since its last report but one."""


class JobMetrics:
    """Metrics of one job, as a context: they are there from its start, and say how it ends.

    Tags: `kind`, train or score; `run`, the run or output folder.
    """

    def __init__(self, kind: str, run: str) -> None:
        tags = {"kind": kind, "run": run}

        def tagged(metric: type[Any], name: str, text: str) -> Any:
            keys = (*tags, "phase") if name == "phase_seconds" else (*tags,)
            return metric(f"mnistsum_{name}", text, keys).set_default_tags(tags)

        self._counters = {name: tagged(Counter, name, text) for name, text in COUNTERS.items()}
        self._gauges = {name: tagged(Gauge, name, text) for name, text in GAUGES.items()}
        self._values: dict[str, float] = {"rows_per_second": 0.0}  # also before the first row
        self._since: dict[str, float] = {}
        """Moments whose ages are gauges."""
        self._phase = ""
        self._lost: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        self.count("jobs_started", 1)
        self.enter("waiting")
        self._lost = _lost_nodes()
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._show()
        self.count("jobs_ended", 1)
        if error and not issubclass(error, KeyboardInterrupt):
            self.count("jobs_failed", 1)

    def count(self, name: str, number: int) -> None:
        """Add to a counter."""
        if number:  # Ray refuses an increment of 0
            self._counters[name].inc(number)

    def set(self, **values: float) -> None:
        """Set gauges that are no ages."""
        self._values |= values

    def enter(self, phase: str) -> None:
        """Begin a phase: waiting (for resources), reading, training, evaluating, scoring, publishing."""
        if phase != self._phase:
            self._phase, self._since["phase_seconds"] = phase, time.monotonic()

    def _show(self) -> None:
        ages = {name: time.monotonic() - moment for name, moment in self._since.items()}
        for name, value in (self._values | ages).items():
            self._gauges[name].set(value, {"phase": self._phase} if name == "phase_seconds" else None)

    def _refresh(self) -> None:
        while True:
            self._show()
            lost = _lost_nodes() - self._lost
            self.count("lost_nodes", len(lost))
            self._lost |= lost
            if self._ended.wait(_REFRESH_SECONDS):
                return


def _lost_nodes() -> set[str]:
    with suppress(Exception):  # the cluster has ended: the job fails on it, and says so
        return {node["NodeID"] for node in ray.nodes() if node.get("DeathReason") in _LOST}
    return set()


class TrainingMetrics(JobMetrics):
    """Metrics of a training, from the events of its loop."""

    def __init__(self, run: str) -> None:
        super().__init__("train", run)
        self._since["checkpoint_age_seconds"] = time.monotonic()
        self._counted = 0

    def expect(self, rows: int, trained: int) -> None:
        """Args: the training rows of all epochs, and those of them that an earlier job has trained, which do not count here."""
        self._counted = trained
        self.set(rows_expected=rows - trained)

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event, see `Console.show`; `checkpoint` says that one is uploaded."""
        match event["kind"]:
            case "progress":
                done = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
                if done > self._counted:  # rows that are trained again after a failure do not count twice
                    self.count("rows", done - self._counted)
                    self._counted = done
                self.set(rows_per_second=event["rows_per_second"], epoch=event["epoch"], loss=event["loss"])
            case "phase":
                self.enter(event["phase"])
            case "checkpoint":
                self._since["checkpoint_age_seconds"] = time.monotonic()
