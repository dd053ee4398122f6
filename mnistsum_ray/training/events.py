"""Events: what the processes of a training tell its driver, by a queue that a thread follows.

kind      sent by                     fields
progress  Trainer.train_epoch         epoch, epochs, rows, of_rows, rows_per_second, loss
epoch     train_loop_per_worker       those of a line of history.jsonl
failure   FailureLines                text
note      Worker.note                 text
counter   HeldOutRows.digit_scores    what, done, total
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

_MIN_SILENCE_SECONDS: Final = 60.0
"""A cluster takes a while to notice what it has lost."""


class EventFollower:
    """Shows and records the events of a run, and ends a training whose workers are silent."""

    def __init__(
        self, console: Console, record: RunRecord, metrics: JobMetrics, wait_seconds: float
    ) -> None:
        self.queue = Queue(actor_options=on_node())  # so that it is not lost with another node
        self.gave_up_after: float | None = None
        """Seconds of silence after which the training was ended; None: it was not."""
        self._console = console
        self._record = record
        self._metrics = metrics
        self._longest_silence = max(wait_seconds, _MIN_SILENCE_SECONDS)
        self._end_training: Callable[[], None] | None = None
        self._heard_at = time.monotonic()
        self._ended = threading.Event()

    def end_if_silent(self, end_training: Callable[[], None]) -> None:
        """From now on call `end_training` if workers do not come, or come back, or say nothing.

        They send something every few seconds. Ray Train waits for them for ever.
        """
        self._heard_at = time.monotonic()
        self._end_training = end_training

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the events while the block runs; after an error the last ones are dropped."""
        thread = threading.Thread(target=self._follow, daemon=True)
        thread.start()
        try:
            yield
            with suppress(ray.exceptions.RayError):  # what was trained counts without its events
                self.queue.put(None)  # the last one: the thread ends once those before it are shown
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
                    self._look_for_silence()
                    continue
                except ray.exceptions.RayError:  # the node is too busy, or the queue has ended
                    if self._ended.wait(1.0):
                        return
                    continue
                if event is None:
                    return
                self._heard_at = time.monotonic()
                try:
                    self._handle(event)
                except Exception as error:
                    what = f"an event of the workers is left out ({event['kind']})"
                    self._console.say(f"{what}: {one_line(error)}")

    def _look_for_silence(self) -> None:
        silent = time.monotonic() - self._heard_at
        if self._end_training and silent > self._longest_silence:
            self.gave_up_after = silent
            end_training, self._end_training = self._end_training, None
            end_training()

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind in ("failure", "note"):
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
