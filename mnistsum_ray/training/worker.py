"""A training worker: its rank and device, and the events that it sends to the driver."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Empty, Queue

from mnistsum_ray.cluster.nodes import on_node, this_node
from mnistsum_ray.cluster.resources import explain_worker_silence
from mnistsum_ray.errors import one_line, root_cause
from mnistsum_ray.model.device import disable_tf32, enable_determinism, tune_malloc
from mnistsum_ray.reporting.console import Console, Progress

_SILENCE_SECONDS: Final = 5.0
"""Time without an event after which there is one of the kind `silence`."""


class EventSender:
    """Sends the events of rank 0 to the driver."""

    def __init__(self, queue: Queue, rank: int) -> None:
        self._queue = queue
        self._rank = rank

    def send(self, kind: str, **fields: Any) -> None:
        """Send one event; `Console.show` lists the kinds and their fields."""
        if self._rank == 0:
            with suppress(ray.exceptions.RayError):  # a lost console line must not end the training
                self._queue.put({"kind": kind, **fields})

    def note(self, text: str) -> None:
        """Send a line for the console."""
        self.send("note", text=text)

    def progress(self, what: str, total: int) -> Progress:
        """A counter that the console shows; see `Progress`."""
        return Progress(partial(self.send, "counter"), what, total)


class FailureLines(ray.train.UserCallback):
    """Says why workers have failed, before Ray Train starts them again."""

    def __init__(self, events: Queue) -> None:
        self._events = EventSender(events, 0)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train in its controller."""
        for rank, error in worker_exceptions.items():
            cause = root_cause(error).partition(". ")[0]  # Ray's advice follows
            text = f"worker {rank} failed: {cause} (full text in Ray's logs)"
            self._events.send("failure", text=text)


@dataclass(frozen=True)
class Worker:
    """Rank, size of the worker group, and the device of this worker."""

    rank: int
    world_size: int
    device: torch.device
    events: EventSender

    @classmethod
    def set_up(cls, events: Queue, threads: int | None) -> "Worker":
        """Set up this process as a training worker.

        `threads` are those of the run; None: the CPUs of the node, divided by its workers.
        """
        context = ray.train.get_context()
        rank = context.get_world_rank()
        device = ray.train.torch.get_device()
        set_up_process(device, threads or max(1, cpus_of_node() // context.get_local_world_size()))
        return cls(rank, context.get_world_size(), device, EventSender(events, rank))


def set_up_process(device: torch.device, threads: int) -> None:
    """Make this process compute exact float32 on GPUs; and set threads, determinism and memory on CPUs."""
    disable_tf32()
    if device.type == "cpu":
        # Ray sets one thread per reserved CPU, and a worker reserves less than one CPU, see resources.py.
        torch.set_num_threads(threads)
        enable_determinism()
        tune_malloc()


def cpus_of_node() -> int:
    """CPUs of the node of this process. Ray can be told of more than there are, and with as many threads a step takes minutes."""
    return max(1, min(int(this_node().get("CPU", 1)), os.cpu_count() or 1))


@contextmanager
def event_queue(console: Console, on_event: Callable[[dict[str, Any]], None]) -> Iterator[Queue]:
    """A queue for the events of the workers, which are shown on the console and given to `on_event`, in a thread."""
    queue = Queue(actor_options=on_node())  # so that it is not lost with another node
    ended = threading.Event()

    def follow() -> None:
        with console.waiting_for("the workers", explain_worker_silence):
            while True:
                try:
                    event = queue.get(timeout=_SILENCE_SECONDS)
                except Empty:
                    event = {"kind": "silence"}
                except Exception as error:  # the node is too busy to answer, or the queue has ended
                    if ended.wait(1.0):
                        return
                    if not isinstance(error, ray.exceptions.RayError):
                        raise
                    continue
                if event is None:
                    return
                try:
                    console.show(event)
                    on_event(event)
                except Exception as error:
                    console.say(f"an event of the workers is left out ({event['kind']}): {one_line(error)}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
        queue.actor.put.remote(None)  # the last event: ends the thread once the events before it are shown
        thread.join(timeout=10)
    finally:  # after an error, events that are still queued are dropped
        ended.set()
        queue.shutdown(force=True)
        thread.join(timeout=5)  # the thread must not call Ray after this process has left the cluster
