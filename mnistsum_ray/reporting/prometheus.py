"""Figures of a running job for Ray's dashboard and its Prometheus endpoint, by `ray.util.metrics`.

Ray puts `ray_` in front of the names, and `_total` behind those of counters. When a process ends,
Ray sends its last values to the agent of its node, which keeps counters while Ray runs there, and
gauges for 20 s.
"""

from typing import Any, Final
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

COUNTERS: Final = {
    "mnistsum_rows": "Training rows of all epochs, or scored rows, rejected ones included.",
    "mnistsum_rejected_rows": "Rows that cannot be scored.",
}
GAUGES: Final = {
    "mnistsum_rows_per_second": "Rate, all workers together.",
    "mnistsum_epoch": "Epoch that is trained, from 1.",
    "mnistsum_loss": "Mean loss a row of this epoch.",
}


class JobMetrics:
    """Metrics of one job.

    Tags: `kind` (train or score) and `run` (the run or output folder, percent-encoded: Ray's tags
    must be ASCII).
    """

    def __init__(self, kind: str, run: str, rows: int = 0) -> None:
        """`rows` are those of an earlier job, which do not count here."""
        tags = {"kind": kind, "run": quote(run, safe="/:")}
        self._metrics: dict[str, Any] = {}
        for metric, texts in ((Counter, COUNTERS), (Gauge, GAUGES)):
            for name, text in texts.items():
                self._metrics[name] = metric(name, text, tuple(tags)).set_default_tags(tags)
        self._counted = {"mnistsum_rows": rows, "mnistsum_rejected_rows": 0}

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
