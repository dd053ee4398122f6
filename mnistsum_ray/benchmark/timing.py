"""Time a loop of batches: start-up, first batch, and rows per second in steady state."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

_WARM_UP_BATCHES: Final = 3

BatchDone = Callable[[int], bool]
"""Called after each batch with its number of rows; True: stop."""


@dataclass(frozen=True)
class Speed:
    """Speed of one way to train or to score."""

    rows_per_second: float
    """In steady state."""
    startup_seconds: float
    """From the command until the first batch is requested."""
    first_batch_seconds: float
    """From the request for the first batch until it is done."""


def time_loop(loop: Callable[[BatchDone], None], seconds: float, device: torch.device, command_time: float) -> Speed:
    """Run a loop until `seconds` after its warm-up; the warm-up batches do not count towards the rate.

    Args:
        loop: runs batches until the function that it is given returns True.
        seconds: length of the measurement.
        device: device of the batches; a GPU is synchronized before the clock is read.
        command_time: when the command was given, in seconds since 1970.
    """
    batches, rows, started, first = 0, 0, 0.0, 0.0
    startup, requested = time.time() - command_time, time.perf_counter()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batch_done(count: int) -> bool:
        nonlocal batches, rows, started, first
        batches += 1
        if batches <= _WARM_UP_BATCHES:
            started = now()
            first = first or started - requested
            return False
        rows += count
        return time.perf_counter() - started > seconds

    loop(batch_done)
    return Speed(rows / (now() - started), startup, first)
