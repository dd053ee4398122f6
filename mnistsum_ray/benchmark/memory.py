"""Upper limits of speed: this package's model on tensors in memory, with no data pipeline and no Ray."""

import multiprocessing
import queue
import time
from typing import Any, Final

import torch

from mnistsum_ray.benchmark.timing import BatchDone, Speed, time_loop
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.int8 import activation_maxima
from mnistsum_ray.model.loss import Objective
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW

BATCH: Final = 256
"""Training batch of the original."""

_CPU_BATCHES: Final = (64, 128, 256, 512)
_GPU_BATCHES: Final = (256, 1024, 2048, 4096, 8192)

_START_TIMEOUT_SECONDS: Final = 300.0
"""More than the processes of `_forward_in_processes` need to start, however many they are."""


def train(images: Pixels, digits: list[int], seconds: float, device: torch.device, command_time: float) -> Speed:
    """Train with the package's model, loss and optimizer."""
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()
    prepared = prepare_images(torch.tensor(images)).to(device)
    labels = torch.tensor(digits, device=device)
    numbers = torch.randint(0, NUMBERS, (len(digits),), device=device)
    model = TwoHeadCNN().to(device)
    optimizer = MuonAdamW(model, weight_decay=0.01)
    objective = Objective(model, 0.0, torch.bfloat16 if faster_with_bf16(device) else torch.float32)

    def loop(batch_done: BatchDone) -> None:
        while True:
            for start in range(0, len(prepared) - BATCH + 1, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad()
                loss, _ = objective(prepared[rows], numbers[rows], labels[rows], None)
                torch.autograd.backward(loss / BATCH)
                optimizer.step(0.01, objective.dtype)
                if batch_done(BATCH):
                    return

    return time_loop(loop, seconds, device, command_time)


def score(images: Pixels, seconds: float, device: torch.device, precision: str | None, command_time: float) -> Speed:
    """Bare forward pass with the fastest batch size, and on CPUs with the fastest number of processes.

    Short runs find the fastest combination, and one long run measures it: the best of several measurements would be a lucky one.
    The search does not count as start-up.
    """
    search_started = time.time()
    if device.type == "cuda":
        batch = max(
            [batch for batch in _GPU_BATCHES if batch <= len(images)],
            key=lambda batch: _forward(images, batch, seconds / 8, device, 0, precision, command_time).rows_per_second,
        )
        return _forward(images, batch, seconds, device, 0, precision, command_time + time.time() - search_started)
    combinations = [(batch, processes) for batch in _CPU_BATCHES for processes in {1, torch.get_num_threads()}]
    batch, processes = max(
        combinations,
        key=lambda pair: _forward_in_processes(images, pair[0], pair[1], seconds / 8, precision, command_time).rows_per_second,
    )
    command_time += time.time() - search_started
    return _forward_in_processes(images, batch, processes, seconds, precision, command_time)


def _forward_in_processes(
    images: Pixels, batch: int, processes: int, seconds: float, precision: str | None, command_time: float
) -> Speed:
    """Forward pass in several processes at once, which share the cores."""
    context = multiprocessing.get_context("spawn")
    barrier, speeds = context.Barrier(processes), context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    arguments = (images[:4096], batch, seconds, threads, precision, command_time, barrier, speeds)
    workers = [context.Process(target=_forward_process, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        measured: list[Speed] = [speeds.get(timeout=seconds + _START_TIMEOUT_SECONDS) for _ in workers]
    except queue.Empty:
        for worker in workers:
            worker.kill()
        raise RunError(f"not all of {processes} processes with the bare forward pass finished (out of memory?)") from None
    for worker in workers:
        worker.join()
    return Speed(
        sum(speed.rows_per_second for speed in measured),
        max(speed.startup_seconds for speed in measured),
        max(speed.first_batch_seconds for speed in measured),
    )


def _forward_process(
    images: Pixels,
    batch: int,
    seconds: float,
    threads: int,
    precision: str | None,
    command_time: float,
    barrier: Any,
    speeds: Any,
) -> None:
    barrier.wait()
    speeds.put(_forward(images, batch, seconds, torch.device("cpu"), threads, precision, command_time))


def _forward(
    images: Pixels, batch: int, seconds: float, device: torch.device, threads: int, precision: str | None, command_time: float
) -> Speed:
    if device.type == "cpu":
        tune_malloc()
        torch.set_num_threads(threads)
    pixels = torch.tensor(images).to(device)
    numbers = torch.randint(0, NUMBERS, (len(images),), device=device)
    model = TwoHeadCNN().eval()
    maxima = activation_maxima(model, pixels[:256]) if precision == "int8" else None
    forward = make_forward(model.to(device), device, precision or ("bf16" if faster_with_bf16(device) else "fp32"), maxima)

    @torch.inference_mode()
    def loop(batch_done: BatchDone) -> None:
        while True:
            for start in range(0, len(pixels) - batch + 1, batch):
                rows = slice(start, start + batch)
                forward(pixels[rows], numbers[rows])
                if batch_done(batch):
                    return

    return time_loop(loop, seconds, device, command_time)
