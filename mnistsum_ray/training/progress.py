"""Progress: what the processes of a training tell its driver, by a queue that a thread follows.

kind      sent by                     fields
progress  Worker.train_epoch          epoch, epochs, step, steps, rows, of_rows,
                                      rows_per_second, loss
epoch     the loop                    those of a line of history.jsonl
counter   HeldOutRows.evaluate        what, done, total
note      the loop, FailureLines      text
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.queue import Empty, Queue

from mnistsum_ray.cluster.resources import describe_free, on_this_node
from mnistsum_ray.errors import RepeatingError, one_line, root_cause
from mnistsum_ray.reporting.console import Console, describe_metrics
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.record import check_storage


class Events:
    """Sends the driver the events of a worker, if it is the one of rank 0."""

    def __init__(self, queue: Queue, rank: int) -> None:
        self._queue = queue
        self._rank = rank

    def send(self, kind: str, **fields: Any) -> None:
        """Send an event of a kind that is listed above."""
        if self._rank == 0:
            with suppress(ray.exceptions.RayError):  # a lost console line must not end the training
                self._queue.put({"kind": kind, **fields})

    def note(self, text: str) -> None:
        self.send("note", text=text)

    def count(self, what: str, done: int, total: int) -> None:
        self.send("counter", what=what, done=done, total=total)


class FailureLines(ray.train.UserCallback):
    """Says why workers have failed, before Ray Train starts them again.

    It ends the run where new workers would fail too, as when the storage refuses.
    """

    def __init__(self, queue: Queue, run: Location) -> None:
        self._events = Events(queue, rank=0)
        self._run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train in its controller, which ends the run if this raises."""
        for error in worker_exceptions.values():
            if isinstance(error, RepeatingError):
                raise error
        for rank, error in worker_exceptions.items():
            cause = root_cause(error).partition(". ")[0]  # Ray's advice follows
            self._events.note(f"worker {rank} failed: {cause} (full text in Ray's logs)")
        check_storage(self._run)


class EventFollower:
    """Shows the events of a run; `add_epoch` gets each line of history.jsonl."""

    def __init__(
        self, console: Console, metrics: JobMetrics, add_epoch: Callable[[dict[str, Any]], None]
    ) -> None:
        self.queue = Queue(actor_options=on_this_node())  # so that it is not lost with another node
        self._console = console
        self._metrics = metrics
        self._add_epoch = add_epoch
        self._ended = threading.Event()

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
        with self._console.waiting_for("the workers", explain_silence):
            while not self._ended.is_set():
                try:
                    event = self.queue.get(timeout=5.0)
                except Empty:
                    continue
                except ray.exceptions.RayActorError:
                    if not self._ended.is_set():
                        lost = "the queue of the workers' events is lost"
                        self._console.say(f"{lost}; the next lines say how the training ends")
                    return
                except ray.exceptions.RayError:  # the node is too busy
                    continue
                if event is None:
                    return
                try:
                    self._handle(event)
                except Exception as error:
                    what = f"an event of the workers is left out ({event['kind']})"
                    self._console.say(f"{what}: {one_line(error)}")

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "note":
            self._console.say(event["text"])
        elif kind == "counter":
            self._console.progress(event["what"], event["done"], event["total"])
        elif kind == "progress":
            done = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
            of_epoch = f"epoch {event['epoch']}/{event['epochs']}"
            of_step = f"step {event['step']}/{event['steps']}"
            note = f"{of_epoch}, {of_step}, loss {event['loss']:.4f}"
            total = event["epochs"] * event["of_rows"]
            self._console.progress("training rows", done, total, note)
            self._metrics.count(rows=done)
            self._metrics.set(planned_rows=total)
            names = ("rows_per_second", "epoch", "loss")
            self._metrics.set(**{name: event[name] for name in names})
        elif kind == "epoch":
            line = {key: value for key, value in event.items() if key != "kind"}
            metrics = describe_metrics(line["test"], counts=False)
            result = f"loss {line['train_loss']:.4f}, test {metrics}"
            rate = f"{line['rows_per_second']:,.0f} rows/s"
            self._console.say(f"epoch {line['epoch']}: {result}, {rate}")
            self._add_epoch(line)


def explain_silence() -> str:
    """Return possible reasons why no worker reports, for a console line."""
    return f"they are being started or replaced, or wait for each other; {describe_free()}"
