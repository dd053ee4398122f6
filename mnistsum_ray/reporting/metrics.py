"""Figures of a running job for Ray's dashboard and its Prometheus endpoint, by `ray.util.metrics`.

Ray puts `ray_` in front of the names. The tag `run` is the run folder or the output folder.
"""

from typing import Any

from ray.util.metrics import Counter, Gauge

_TAGS = ("run",)


class TrainingMetrics:
    """`mnistsum_train_rows` (counter), `mnistsum_train_rows_per_second`, `mnistsum_train_epoch` and `mnistsum_train_loss`."""

    def __init__(self, run: str) -> None:
        self._rows = Counter("mnistsum_train_rows", "Training rows, all epochs and workers together.", _TAGS)
        self._rate = Gauge("mnistsum_train_rows_per_second", "Training rows per second, all workers together.", _TAGS)
        self._epoch = Gauge("mnistsum_train_epoch", "Epoch that is trained, from 1.", _TAGS)
        self._loss = Gauge("mnistsum_train_loss", "Mean loss a row of this epoch, in nats.", _TAGS)
        for metric in (self._rows, self._rate, self._epoch, self._loss):
            metric.set_default_tags({"run": run})
        self._counted = 0

    def add(self, event: dict[str, Any]) -> None:
        """Take in a progress event of the training loop; see `Console.show`."""
        done = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
        if done > self._counted:  # rows that are trained again after a failure do not count twice
            self._rows.inc(done - self._counted)
            self._counted = done
        self._rate.set(event["rows_per_second"])
        self._epoch.set(event["epoch"])
        self._loss.set(event["loss"])


class ScoringMetrics:
    """`mnistsum_score_rows`, `mnistsum_score_rejected_rows` (counters) and `mnistsum_score_rows_per_second`."""

    def __init__(self, output: str) -> None:
        self._rows = Counter("mnistsum_score_rows", "Rows whose file is written, rejected ones included.", _TAGS)
        self._rejected = Counter("mnistsum_score_rejected_rows", "Rows that cannot be scored.", _TAGS)
        self._rate = Gauge("mnistsum_score_rows_per_second", "Rows per second, all workers together.", _TAGS)
        for metric in (self._rows, self._rejected, self._rate):
            metric.set_default_tags({"run": output})

    def add(self, rows: int, rejected: int, rows_per_second: float) -> None:
        """Count a finished part.

        Args:
            rows: of the part.
            rejected: those of them that cannot be scored.
            rows_per_second: since the run began.
        """
        for counter, count in ((self._rows, rows), (self._rejected, rejected)):
            if count:  # Ray refuses an increment of 0
                counter.inc(count)
        self._rate.set(rows_per_second)
