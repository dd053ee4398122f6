"""Figures of a running job for Ray's dashboard and its Prometheus endpoint, by `ray.util.metrics`.

Ray puts `ray_` in front of the names, and `_total` behind those of counters. The tag `run` is the run or output folder.
A job that ends hands on its last values. Its node then keeps the counters as long as Ray runs there, and the gauges for 20 s.
"""

from typing import Any

from ray.util.metrics import Counter, Gauge

from mnistsum_ray.cluster.ray_internals import begin_at_zero


def _tagged(kind: type[Any], name: str, text: str, run: str) -> Any:
    metric = kind(f"mnistsum_{name}", text, ("run",))
    metric.set_default_tags({"run": run})
    return begin_at_zero(metric) if kind is Counter else metric


def _rate(name: str, run: str) -> Any:
    rate = _tagged(Gauge, name, "Rows per second, all workers together.", run)
    rate.set(0)  # it says that the job runs, also before its first row
    return rate


class TrainingMetrics:
    """`mnistsum_train_rows` (counter), `mnistsum_train_rows_per_second`, `mnistsum_train_epoch` and `mnistsum_train_loss`."""

    def __init__(self, run: str, counted: int = 0) -> None:
        """Args: the run folder; and the rows of the epochs that an earlier job has trained, which do not count here."""
        self._rows = _tagged(Counter, "train_rows", "Training rows, all epochs and workers together.", run)
        self._rate = _rate("train_rows_per_second", run)
        self._epoch = _tagged(Gauge, "train_epoch", "Epoch that is trained, from 1.", run)
        self._loss = _tagged(Gauge, "train_loss", "Mean loss a row of this epoch, in nats.", run)
        self._counted = counted

    def add(self, event: dict[str, Any]) -> None:
        """Take in a progress event of the training loop (see `Console.show`), or likewise the end of an epoch."""
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
        self._rows = _tagged(Counter, "score_rows", "Rows whose file is written, rejected ones included.", output)
        self._rejected = _tagged(Counter, "score_rejected_rows", "Rows that cannot be scored.", output)
        self._rate = _rate("score_rows_per_second", output)

    def add(self, rows: int, rejected: int, rows_per_second: float) -> None:
        """Count finished rows, `rejected` of which cannot be scored; the rate is since the run began."""
        for counter, count in ((self._rows, rows), (self._rejected, rejected)):
            if count:  # Ray refuses an increment of 0
                counter.inc(count)
        self._rate.set(rows_per_second)
