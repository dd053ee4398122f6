"""A process that computes on rows: its settings, its device, and its events for the driver."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray.exceptions
import torch
from ray.util.queue import Queue

from mnistsum_ray.model.device import disable_tf32, enable_determinism, tune_malloc


def send(events: Queue, kind: str, **fields: Any) -> None:
    """Send the driver an event; events.py lists kinds and fields."""
    with suppress(ray.exceptions.RayError):  # a lost console line must not end the training
        events.put({"kind": kind, **fields})


@dataclass(frozen=True)
class Worker:
    """A process that computes: its rank of `world_size`, its device, and the queue of events."""

    rank: int
    world_size: int
    device: torch.device
    events: Queue | None

    def send(self, kind: str, **fields: Any) -> None:
        """Send the driver an event, of rank 0 alone."""
        if self.rank == 0 and self.events is not None:
            send(self.events, kind, **fields)

    def note(self, text: str) -> None:
        """Send a line for the console."""
        self.send("note", text=text)


def set_up_process(device: torch.device, threads: int | None) -> None:
    """Make this process compute exact float32 on GPUs, and on CPUs the same bits each time."""
    disable_tf32()
    if threads is not None:  # Ray sets one per reserved CPU, and a worker reserves less than one
        torch.set_num_threads(threads)
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()
