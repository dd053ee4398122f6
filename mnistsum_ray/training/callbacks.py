"""TODO training.callbacks"""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import Fence
from mnistsum_ray.training.artifacts import publish_model

if TYPE_CHECKING:
    pass


_ABORT_SECONDS: Final = 3.0


class InterruptibleTrainer(ray.train.torch.TorchTrainer):
    """Leaves signals to this process: Ray Train would set a handler for Ctrl-C, for good, that ends it with exit code 0."""

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers, if there are any."""
        if self.controller is not None:
            with suppress(Exception):  # whatever it is, they end with this process
                ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)


class RunCallback(ray.train.UserCallback):
    """Runs beside the driver: publishes after every epoch, and says when workers are lost, which Ray Train does not."""

    def __init__(self, folder: Location, events: Queue, fence: Fence) -> None:
        self._folder, self._events, self._fence = folder, events, fence

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None) -> None:
        if checkpoint is not None:
            with checkpoint.as_directory() as local:
                history = json.loads((Path(local) / "trainer.json").read_text())["history"]
            self._fence.check()
            if history:  # one saved within the first epoch, since a node was about to go, holds no model yet
                publish_model(self._folder, checkpoint, history)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            text = str(getattr(error, "_base_exc", error)).strip().splitlines() or [type(error).__name__]
            self._events.put({"kind": "note", "text": f"worker {rank} failed: {text[0]} (full text in Ray's logs)"})
