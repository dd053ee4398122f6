"""A training worker as the driver sees it: its rank and device, the events that it sends, and Ray Train's hooks."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue

from mnistsum_ray.cluster.connection import can_connect
from mnistsum_ray.cluster.nodes import on_node, this_node
from mnistsum_ray.cluster.resources import explain_worker_silence
from mnistsum_ray.errors import counted, lines_of
from mnistsum_ray.model.collectives import all_reduce_sum
from mnistsum_ray.model.device import disable_tf32, enable_determinism, tune_malloc
from mnistsum_ray.reporting.console import Console, Progress

_FAILURE: Final = "failure"

_ABORT_SECONDS: Final = 3.0

_CHECK_SECONDS: Final = 1.0


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
        with suppress(ray.exceptions.RayError):  # a lost console line must not end the training
            self._queue.put(event)

    def note(self, text: str) -> None:
        """Send a line for the console."""
        self.send("note", text=text)

    def progress(self, what: str, total: int) -> Progress:
        """A counter that the console shows; see `Progress`."""
        return Progress(partial(self.send, "counter"), what, total)


@dataclass(frozen=True)
class Worker:
    """Rank, size of the worker group, and the device of this worker."""

    rank: int
    world_size: int
    device: torch.device
    cpus: int
    """This worker's part of the CPUs of its node."""
    events: EventSender

    @classmethod
    def set_up(cls, events: Queue, threads: int | None) -> "Worker":
        """Set up this process as a training worker: exact float32 on GPUs; threads, determinism and memory on CPUs.

        `threads` are those of the run; None: this worker's part of the CPUs of its node.
        """
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        disable_tf32()
        cpus = max(1, cpus_of_node() // context.get_local_world_size())
        if device.type == "cpu":
            # Ray sets one thread per reserved CPU, and a worker reserves less than one CPU, see resources.py.
            torch.set_num_threads(threads or cpus)
            enable_determinism()
            tune_malloc()
        rank = context.get_world_rank()
        if threads and threads > cpus:  # a line of any rank
            text = f"worker {rank} has {counted(cpus, 'CPU')} for the run's {threads} threads: slower, and the same bits"
            EventSender(events, rank=0).note(text)
        return cls(rank, context.get_world_size(), device, cpus, EventSender(events, rank))

    def all_agree(self, value: bool) -> bool:
        """True on every worker if the value is true on every worker."""
        return bool(all_reduce_sum(torch.tensor(float(value), device=self.device)).item() == self.world_size)


def cpus_of_node() -> int:
    """CPUs of the node of this process. Ray can be told of more than there are, and with as many threads a step takes minutes."""
    return max(1, min(int(this_node().get("CPU", 1)), os.cpu_count() or 1))


@dataclass
class Events:
    """The queue, and the first failure that came through it."""

    queue: Queue
    failed: threading.Event = field(default_factory=threading.Event)
    failure: str = ""


@contextmanager
def event_queue(
    console: Console, on_epoch: Callable[[dict[str, Any]], None], on_progress: Callable[[dict[str, Any]], None]
) -> Iterator[Events]:
    """A queue whose events are shown on the console while the block runs; failures are kept.

    `on_epoch` gets each finished epoch's line of history.jsonl, and `on_progress` each progress event, in a thread of the queue.
    """
    queue = Queue(actor_options=on_node())  # so that it is not lost with another node
    events, ended = Events(queue), threading.Event()

    def follow() -> None:
        with console.waiting_for("the workers", explain_worker_silence):
            while True:
                try:
                    event = queue.get()
                except Exception as error:  # the node is too busy to answer, or the actor or this process's connection has ended
                    if ended.wait(1.0):
                        return
                    if not isinstance(error, ray.exceptions.RayError):
                        raise
                    continue
                if event is None:
                    return
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
        queue.actor.put.remote(None)  # the last event: ends the thread once the events before it are shown
        thread.join(timeout=10)
    finally:  # after an error, events that are still queued are dropped
        ended.set()
        queue.shutdown(force=True)
        thread.join(timeout=5)  # the thread must not call Ray after this process has left the cluster


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer that leaves SIGINT to this process, and its workers in peace.

    Ray Train 2.60 has no options against three of its habits; tests/training/test_worker.py fails when a name changes.

    - `_register_sigint_handler` would install a handler for SIGINT for good, which ends the process with exit code 0.
    - `PlacementGroupCleanerCallback` asks each second whether the controller is alive, and it asks any Ray cluster that runs on
      this machine. Another one does not know the controller; then the workers are killed. Without it nothing is left behind:
      a placement group ends with the job that has created it.
    - `DatasetsCallback` starts a process for the datasets of the trainer, which here are none: a second of a CPU while the
      workers start.
    """

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        left_out = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [callback for callback in callbacks if type(callback).__name__ not in left_out]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers, if they have been started; `fit` then raises RayActorError."""
        if self.controller is not None:
            with suppress(Exception):  # workers that do not end now end with this process
                ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)

    @contextmanager
    def aborted_by(self, check: Callable[[], bool]) -> Iterator[None]:
        """Abort the run as soon as `check`, called once a second in another thread, returns True."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_CHECK_SECONDS):
                if check():
                    self.abort()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class RunCallback(ray.train.UserCallback):
    """Reports lost nodes and workers. Runs in Ray Train's controller process."""

    def __init__(self, events: Queue) -> None:
        self._events = EventSender(events, rank=0)
        self._lost = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send a console line for each lost node and failed worker; Ray Train itself says nothing until it gives up."""
        for node in ray.nodes():
            name, address = node["NodeID"], node["NodeManagerAddress"]
            # Ray notices that a node is gone after the workers that are left have failed, which name none.
            if name not in self._lost and not (node["Alive"] and can_connect(address, node["NodeManagerPort"])):
                self._lost.add(name)
                self._events.note(f"the node {address} was lost with its workers")
        for rank, error in worker_exceptions.items():
            self._events.note(f"worker {rank} failed: {lines_of(error)[0]} (full text in Ray's logs)")
