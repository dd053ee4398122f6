"""Events: what the processes of a training tell its driver, by a queue that a thread follows.

kind      sent by                     fields
begin     train_loop_per_worker
progress  Trainer.train_epoch         epoch, epochs, rows, of_rows, rows_per_second, loss
epoch     train_loop_per_worker       those of a line of history.jsonl
failure   FailureLines                text
note      Worker.note                 text
counter   HeldOutRows.digit_scores    what, done, total
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray
import ray.exceptions
from ray.util.queue import Empty, Queue

from mnistsum_ray.cluster.nodes import on_node
from mnistsum_ray.cluster.resources import explain_worker_silence
from mnistsum_ray.errors import one_line
from mnistsum_ray.reporting.console import Console, accuracies
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.training.record import RunRecord

_MIN_WAIT_SECONDS: Final = 60.0
"""Shortest wait for workers to report: a cluster takes a while to notice what it has lost."""


class EventFollower:
    """Shows and records the events of a run, and ends a training whose workers do not come."""

    def __init__(
        self, console: Console, record: RunRecord, metrics: JobMetrics, wait_seconds: float
    ) -> None:
        self.queue = Queue(actor_options=on_node())  # so that it is not lost with another node
        self.gave_up_after: float | None = None
        """Seconds that workers were waited for in vain; None: the training was not ended."""
        self._console = console
        self._record = record
        self._metrics = metrics
        self._longest_wait = max(wait_seconds, _MIN_WAIT_SECONDS)
        self._end_training: Callable[[], None] = lambda: None
        self._wanted_at: float | None = None
        """When workers were wanted that have not reported yet."""
        self._ended = threading.Event()

    def expect_workers(self, end_training: Callable[[], None]) -> None:
        """Workers are wanted from now on; if they do not come in time, call `end_training`."""
        self._end_training = end_training
        self._wanted_at = time.monotonic()

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the events while the block runs; after an error the last ones are dropped."""
        thread = threading.Thread(target=self._follow, daemon=True)
        thread.start()
        try:
            yield
            self.queue.put(None)  # the last event: the thread ends once those before it are shown
            thread.join(timeout=10)
        finally:
            self._ended.set()
            ray.kill(self.queue.actor)  # `queue.shutdown` would take it from under the thread
            thread.join(timeout=5)  # it must not call Ray after this process has left the cluster

    def _follow(self) -> None:
        with self._console.waiting_for("the workers", explain_worker_silence):
            while True:
                try:
                    event = self.queue.get(timeout=5.0)
                except Empty:
                    self._end_if_late()
                    continue
                except ray.exceptions.RayError:  # the node is too busy, or the queue has ended
                    if self._ended.wait(1.0):
                        return
                    continue
                if event is None:
                    return
                try:
                    self._handle(event)
                except Exception as error:
                    what = f"an event of the workers is left out ({event['kind']})"
                    self._console.say(f"{what}: {one_line(error)}")

    def _end_if_late(self) -> None:
        """End the training if its workers have not come in time: Ray Train waits for ever."""
        if self._wanted_at is None:
            return
        waited = time.monotonic() - self._wanted_at
        if waited > self._longest_wait:
            self.gave_up_after = waited
            self._wanted_at = None
            self._end_training()

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "begin":
            self._wanted_at = None
        elif kind == "failure":
            self._console.say(event["text"])
            self._wanted_at = time.monotonic()
        elif kind == "note":
            self._console.say(event["text"])
        elif kind == "counter":
            self._console.progress(event["what"], event["done"], event["total"])
        elif kind == "progress":
            done = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
            note = f"epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.4f}"
            total = event["epochs"] * event["of_rows"]
            self._console.progress("training rows", done, total, note)
            self._metrics.count(rows=done)
            names = ("rows_per_second", "epoch", "loss")
            self._metrics.set(**{name: event[name] for name in names})
        elif kind == "epoch":
            line = {key: value for key, value in event.items() if key != "kind"}
            result = f"loss {line['train_loss']:.4f}, test {accuracies(line['test'])}"
            rate = f"{line['rows_per_second']:,.0f} rows/s"
            self._console.say(f"epoch {line['epoch']}: {result}, {rate}")
            self._record.add_epoch(line)  # after an error it is written with the next one
