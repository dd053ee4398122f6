"""Figures of a running job for Ray's dashboard and its Prometheus endpoint, by `ray.util.metrics`.

Ray puts `ray_` in front of the names, and `_total` behind those of counters. When a process ends,
Ray sends its last values to the agent of its node, which keeps counters while Ray runs there, and
gauges for 20 s after they were set, also those of a living process.

Each job has a series of its own. Its counters include what earlier jobs of the run have done, so
the greatest one of a run counts no row twice.
"""

from typing import Any, Final
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

COUNTERS: Final = {
    "mnistsum_rows": "Training rows of the epochs, or scored rows, rejected ones included.",
    "mnistsum_rejected_rows": "Rows that cannot be scored.",
}
GAUGES: Final = {
    "mnistsum_planned_rows": "Rows of the run, as the job finds them when it begins.",
    "mnistsum_rejected_files": "Files that cannot be scored.",
    "mnistsum_last_success_seconds": "Unix time at which the job has succeeded.",
    "mnistsum_rows_per_second": "Rate, all workers together.",
    "mnistsum_epoch": "Epoch that is trained, from 1.",
    "mnistsum_loss": "Mean loss a row of this epoch.",
}

_counted: Final[dict[str, dict[str, int]]] = {}
"""What this process has counted, by run: Ray continues its series in the next job."""


class JobMetrics:
    """Metrics of one job.

    Tags: `kind` (train or score) and `run` (the run or output folder, percent-encoded: Ray's tags
    must be ASCII).
    """

    def __init__(self, kind: str, run: str) -> None:
        tags = {"kind": kind, "run": quote(run, safe="/:")}
        self._metrics: dict[str, Any] = {}
        for metric, texts in ((Counter, COUNTERS), (Gauge, GAUGES)):
            for name, text in texts.items():
                self._metrics[name] = metric(name, text, tuple(tags)).set_default_tags(tags)
        self._counted = _counted.setdefault(run, dict.fromkeys(COUNTERS, 0))

    def count(self, **totals: int) -> None:
        """Bring counters, named without `mnistsum_`, up to these totals.

        After a failure totals begin again at a checkpoint: rows do not count twice.
        """
        for short, total in totals.items():
            name = f"mnistsum_{short}"
            more = total - self._counted[name]
            if more > 0:
                self._metrics[name].inc(more)
                self._counted[name] = total

    def set(self, **values: float) -> None:
        for name, value in values.items():
            self._metrics[f"mnistsum_{name}"].set(value)
