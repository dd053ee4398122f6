"""Upper limits of speed: this package's model on tensors in memory, with no data pipeline and no Ray."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

import torch

from mnistsum_ray.benchmark.original import BATCH
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.int8 import activation_maxima
from mnistsum_ray.model.network import Objective, TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW

Measurement = dict[str, float]
"""`rows_per_second` in steady state; `startup_seconds` from the command until the first batch is requested;
`first_batch_seconds` from there until it is done. Ray's jobs have further figures."""

_WARM_UP_BATCHES: Final = 3

_CPU_BATCHES: Final = (64, 128, 256, 512)
_GPU_BATCHES: Final = (256, 1024, 2048, 4096, 8192)


def time_batches(batches: Iterator[int], seconds: float, device: torch.device, command_time: float) -> Measurement:
    """Measure until `seconds` after the warm-up, whose batches do not count towards the rate.

    Args:
        batches: works on a batch when it is asked for the next one, and yields its number of rows; endless.
        seconds: length of the measurement.
        device: of the batches; a GPU is synchronized before the clock is read.
        command_time: when the command was given, in seconds since 1970.
    """

    def after(count: int) -> float:
        for _ in range(count):
            next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    startup, requested = time.time() - command_time, time.perf_counter()
    first, started, rows = after(1) - requested, after(_WARM_UP_BATCHES - 1), 0
    while time.perf_counter() - started < seconds:
        rows += next(batches)
    return {"rows_per_second": rows / (after(0) - started), "startup_seconds": startup, "first_batch_seconds": first}


def train(images: Pixels, digits: list[int], device: torch.device) -> Iterator[int]:
    """Train with the package's model, loss and optimizer, without end; yields the rows of each batch."""
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()
    prepared = prepare_images(torch.tensor(images)).to(device)
    labels = torch.tensor(digits, device=device)
    numbers = torch.randint(0, NUMBERS, (len(digits),), device=device)
    model = TwoHeadCNN().to(device)
    optimizer = MuonAdamW(model, weight_decay=0.01)
    objective = Objective(model, 0.0, torch.bfloat16 if faster_with_bf16(device) else torch.float32)

    def batches() -> Iterator[int]:
        while True:
            for start in range(0, len(prepared) - BATCH + 1, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad()
                loss, _ = objective(prepared[rows], numbers[rows], labels[rows], None)
                torch.autograd.backward(loss / BATCH)
                optimizer.step(0.01, objective.dtype)
                yield BATCH

    return batches()


def score(images: Pixels, seconds: float, device: torch.device, precision: str | None, command_time: float) -> Measurement:
    """Bare forward pass with the fastest batch size, and on CPUs with the fastest number of processes.

    Short runs find the fastest combination, and one long run measures it: the best of several measurements would be a lucky one.
    The search does not count as start-up.
    """
    started, threads = time.time(), torch.get_num_threads()

    def run(choice: tuple[int, int], seconds: float, command_time: float) -> Measurement:
        return _forward_in_processes(images, precision, device, *choice, seconds, command_time)

    if device.type == "cuda":
        choices = [(1, batch) for batch in _GPU_BATCHES if batch <= len(images)]
    else:
        choices = [(processes, batch) for batch in _CPU_BATCHES for processes in {1, threads}]
    fastest = max(choices, key=lambda choice: run(choice, seconds / 8, command_time)["rows_per_second"])
    return run(fastest, seconds, command_time + time.time() - started)


def _forward_in_processes(
    images: Pixels, precision: str | None, device: torch.device, processes: int, batch: int, seconds: float, command_time: float
) -> Measurement:
    """Forward pass in several processes at once, which share the cores."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        threads, barrier = max(1, torch.get_num_threads() // processes), manager.Barrier(processes)
        one = (images, precision, device, threads, batch, seconds, command_time, barrier)
        try:
            measured = [future.result() for future in [pool.submit(_forward, *one) for _ in range(processes)]]
        except BrokenProcessPool:
            raise RunError(f"not all of {processes} processes with the bare forward pass finished (out of memory?)") from None
    figures = {key: [measurement[key] for measurement in measured] for key in measured[0]}
    return {key: sum(values) if key == "rows_per_second" else max(values) for key, values in figures.items()}


def _forward(
    images: Pixels,
    precision: str | None,
    device: torch.device,
    threads: int,
    batch: int,
    seconds: float,
    command_time: float,
    barrier: Any,
) -> Measurement:
    """Forward pass in this process, which begins together with the others."""
    tune_malloc()
    torch.set_num_threads(threads)
    pixels = torch.tensor(images).to(device)
    numbers = torch.randint(0, NUMBERS, (len(images),), device=device)
    model = TwoHeadCNN().eval()
    maxima = activation_maxima(model, pixels[:256].cpu()) if precision == "int8" else None
    forward = make_forward(model.to(device), device, precision or ("bf16" if faster_with_bf16(device) else "fp32"), maxima)

    @torch.inference_mode()
    def batches() -> Iterator[int]:
        while True:
            for start in range(0, len(pixels) - batch + 1, batch):
                rows = slice(start, start + batch)
                forward(pixels[rows], numbers[rows])
                yield batch

    barrier.wait()
    return time_batches(batches(), seconds, device, command_time)
