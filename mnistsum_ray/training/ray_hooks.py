"""Hooks into Ray Train: an interruptible trainer, and console lines for lost nodes and workers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from mnistsum_ray.cluster.connection import can_connect
from mnistsum_ray.errors import lines_of
from mnistsum_ray.training.worker import EventSender

_ABORT_SECONDS: Final = 3.0

_CHECK_SECONDS: Final = 1.0


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """TorchTrainer that leaves SIGINT to this process, and its workers in peace.

    Ray Train 2.60 has no options against three of its habits; tests/training/test_ray_hooks.py fails when a name changes.

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
