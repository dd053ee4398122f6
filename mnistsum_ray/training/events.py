"""Events from the workers to the console of the driver: progress, finished epochs, notes."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import ray
import ray.exceptions
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.resources import explain_worker_silence
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.progress import Progress, silence_watchdog

_FAILURE: Final = "failure"


@dataclass
class Events:
    """The queue, and the first failure that came through it."""

    queue: Queue
    failed: threading.Event = field(default_factory=threading.Event)
    failure: str = ""


class EventSender:
    """Sends events to the driver: all of rank 0, and failures of any rank."""

    def __init__(self, queue: Queue, rank: int) -> None:
        self._queue, self._rank = queue, rank

    def send(self, kind: str, **fields: Any) -> None:
        """Send one event; `Console.show` lists the kinds and their fields."""
        if self._rank == 0:
            self._put({"kind": kind, **fields})

    def fail(self, text: str) -> None:
        """Have the driver end the run: another attempt would fail in the same way."""
        self._put({"kind": _FAILURE, "text": text})

    def _put(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # a lost console line must not end the training
            self._queue.put(event)

    def note(self, text: str) -> None:
        """Send a line for the console."""
        self.send("note", text=text)

    def progress(self, what: str, total: int) -> Progress:
        """A counter that the console shows; see `Progress`."""
        return Progress(lambda counter: self.send("counter", **vars(counter)), what, total)


@contextmanager
def event_queue(
    console: Console, on_epoch: Callable[[dict[str, Any]], None], on_progress: Callable[[dict[str, Any]], None]
) -> Iterator[Events]:
    """A queue whose events are shown on the console while the block runs; failures are kept.

    Args:
        console: shows the events.
        on_epoch: called with each finished epoch's line of history.jsonl, in a thread of the queue.
        on_progress: called with each progress event, in the same thread.
    """
    # The queue's actor is pinned to this node, so that it is not lost with another one.
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node})
    events, ended, dropping = Events(queue), threading.Event(), threading.Event()

    def follow() -> None:
        with silence_watchdog(console.say, explain_worker_silence) as heard:
            while True:
                try:
                    event = queue.get()
                except ray.exceptions.RayError:  # the node is too busy to answer, or the actor has ended
                    if ended.wait(1.0):
                        return
                    continue
                if event is None or dropping.is_set():
                    return
                heard()
                if event["kind"] == _FAILURE:
                    events.failure = events.failure or event["text"]
                    events.failed.set()
                    continue
                console.show(event)
                if event["kind"] == "progress":
                    on_progress(event)
                if event["kind"] == "epoch":
                    on_epoch({key: value for key, value in event.items() if key != "kind"})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield events
    except BaseException:
        dropping.set()  # events that are still queued are dropped
        raise
    finally:
        queue.actor.put.remote(None)  # the last event: ends the thread once the events before it are shown
        thread.join(timeout=10)
        ended.set()
        queue.shutdown(force=True)
        thread.join(timeout=5)  # the thread must not call Ray after this process has left the cluster
