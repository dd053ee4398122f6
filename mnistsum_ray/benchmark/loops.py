"""Plain PyTorch to compare with: the original's way, row by row, and our model on tensors in memory. Nothing of Ray."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray.data.decoding import Pixels
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import make_forward
from mnistsum_ray.model.loss import joint_loss
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.quantization import activation_maxima

BATCH: Final = 256
"""The original's."""

_BATCHES: Final = (64, 128, 256, 512)

_START_SECONDS: Final = 300.0
"""More than so many processes take to begin, however many."""


class OriginalNet(nn.Module):
    """The network as one would write it from the assignment: ReLU, then pool; PyTorch's own initial weights and layout."""

    def __init__(self) -> None:
        super().__init__()
        channels = [(1, 32, 1), (32, 64, 1), (64, 64, 1), (64, 64, 1), (64, 64, 0), (64, 128, 0), (128, 10, 0)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=padding) for a, b, padding in channels)
        self.fc1, self.fc2 = nn.Linear(20, 128), nn.Linear(128, 19)

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if index < 6:
                x = F.relu(x)
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        digit = x.flatten(1)
        return digit, self.fc2(F.relu(self.fc1(torch.cat([digit, number], dim=1))))


class OriginalDataset(Dataset[tuple[torch.Tensor, torch.Tensor, int, int]]):
    """An MNIST image, a random number as one-hot, the digit and the sum; one row at a time, as the assignment has it."""

    def __init__(self, images: Pixels, digits: list[int]) -> None:
        self.images, self.digits = images, digits
        self.transform = Compose([ToTensor(), Normalize((PIXEL_MEAN,), (PIXEL_STD,))])

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        number = int(torch.randint(0, 10, (1,)))
        image = self.transform(self.images[index][:, :, None])
        return image, F.one_hot(torch.tensor(number), 10).float(), self.digits[index], self.digits[index] + number


@dataclass(frozen=True)
class Speed:
    """What a way of training or scoring takes."""

    rows_per_second: float
    """In steady state."""
    startup_seconds: float
    """From the command until the first batch is asked for."""
    first_batch_seconds: float


def loader_loop(images: Pixels, digits: list[int], seconds: float, device: torch.device, began: float) -> Speed:
    """The original's way to train for so many seconds; `began` is when the command was given, in seconds since 1970."""
    loader = DataLoader(OriginalDataset(images, digits), batch_size=BATCH, shuffle=True)
    model = OriginalNet().to(device)
    optimizer = torch.optim.Adam(model.parameters())

    def steps(tick: Callable[[int], bool]) -> None:
        while True:
            for batch in loader:
                image, number, digit, total = (values.to(device) for values in batch)
                optimizer.zero_grad()
                digit_scores, sum_scores = model(image, number)
                loss = (F.cross_entropy(digit_scores, digit) + F.cross_entropy(sum_scores, total)) / 2
                torch.autograd.backward(loss)
                optimizer.step()
                if tick(len(image)):
                    return

    return _rate(steps, seconds, device, began)


def memory_loop(images: Pixels, digits: list[int], seconds: float, device: torch.device, began: float) -> Speed:
    """Our model trained on tensors in memory."""
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()
    ready = prepare_images(torch.tensor(images)).to(device)
    truth = torch.tensor(digits, device=device)
    numbers = torch.randint(0, 10, (len(digits),), device=device)
    model = TwoHeadCNN().to(device)
    optimizer = MuonAdamW(model, weight_decay=0.01)
    bf16 = faster_with_bf16(device)

    def steps(tick: Callable[[int], bool]) -> None:
        while True:
            for start in range(0, len(ready) - BATCH + 1, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    digit_scores, sum_scores = model(ready[rows], numbers[rows])
                torch.autograd.backward(joint_loss(digit_scores, sum_scores, truth[rows], numbers[rows]) / BATCH)
                optimizer.step(0.01)
                if tick(BATCH):
                    return

    return _rate(steps, seconds, device, began)


def _rate(steps: Callable[[Callable[[int], bool]], None], seconds: float, device: torch.device, began: float) -> Speed:
    """The speed, in steady state after a warm-up of three steps."""
    seen, rows, started, first = 0, 0, 0.0, 0.0
    startup, asked = time.time() - began, time.perf_counter()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick(count: int) -> bool:
        nonlocal seen, rows, started, first
        seen += 1
        if seen <= 3:
            started = now()
            first = first or started - asked
            return False
        rows += count
        return time.perf_counter() - started > seconds

    steps(tick)
    return Speed(rows / (now() - started), startup, first)


def score_loader_loop(images: Pixels, digits: list[int], seconds: float, device: torch.device, began: float) -> Speed:
    """The original's way to evaluate."""
    loader = DataLoader(OriginalDataset(images, digits), batch_size=BATCH)
    model = OriginalNet().eval().to(device)

    @torch.no_grad()
    def steps(tick: Callable[[int], bool]) -> None:
        while True:
            for image, number, _, _ in loader:
                for scores in model(image.to(device), number.to(device)):
                    scores.argmax(1).cpu()
                if tick(len(image)):
                    return

    return _rate(steps, seconds, device, began)


def score_memory_loop(images: Pixels, seconds: float, device: torch.device, precision: str | None, began: float) -> Speed:
    """The bare forward pass of our model: its best batch, and on CPUs its best share of threads.

    The best is found in short runs and then measured for so many seconds: the best of several would be the luckiest. The
    search is no part of the start-up.
    """
    searching = time.time()
    if device.type == "cuda":
        batch = max(
            [batch for batch in (256, 1024, 2048, 4096, 8192) if batch <= len(images)],
            key=lambda batch: _forward(images, batch, seconds / 8, device, 0, precision, began).rows_per_second,
        )
        return _forward(images, batch, seconds, device, 0, precision, began + time.time() - searching)
    ways = [(batch, processes) for batch in _BATCHES for processes in {1, torch.get_num_threads()}]
    batch, processes = max(
        ways, key=lambda way: _processes(images, way[0], way[1], seconds / 8, precision, began).rows_per_second
    )
    return _processes(images, batch, processes, seconds, precision, began + time.time() - searching)


def _processes(images: Pixels, batch: int, processes: int, seconds: float, precision: str | None, began: float) -> Speed:
    """The forward pass in so many processes at once, which share the cores."""
    context = multiprocessing.get_context("spawn")
    together, speeds = context.Barrier(processes), context.Queue()
    threads = max(1, torch.get_num_threads() // processes)
    arguments = (images[:4096], batch, seconds, threads, precision, began, together, speeds)
    workers = [context.Process(target=_one_process, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        measured: list[Speed] = [speeds.get(timeout=seconds + _START_SECONDS) for _ in workers]
    except queue.Empty:
        for worker in workers:
            worker.kill()
        raise RunError(f"of {processes} processes with the bare forward pass not all came to an end (out of memory?)") from None
    for worker in workers:
        worker.join()
    return Speed(
        sum(speed.rows_per_second for speed in measured),
        max(speed.startup_seconds for speed in measured),
        max(speed.first_batch_seconds for speed in measured),
    )


def _one_process(
    images: Pixels, batch: int, seconds: float, threads: int, precision: str | None, began: float, together: Any, speeds: Any
) -> None:
    together.wait()
    speeds.put(_forward(images, batch, seconds, torch.device("cpu"), threads, precision, began))


def _forward(
    images: Pixels, batch: int, seconds: float, device: torch.device, threads: int, precision: str | None, began: float
) -> Speed:
    if device.type == "cpu":
        tune_malloc()
        torch.set_num_threads(threads)
    pixels = torch.tensor(images).to(device)
    numbers = torch.randint(0, 10, (len(images),), device=device)
    model = TwoHeadCNN().eval()
    maxima = activation_maxima(model, pixels[:256]) if precision == "int8" else None
    forward = make_forward(model.to(device), device, precision or ("bf16" if faster_with_bf16(device) else "fp32"), maxima)

    @torch.inference_mode()
    def steps(tick: Callable[[int], bool]) -> None:
        while True:
            for start in range(0, len(pixels) - batch + 1, batch):
                rows = slice(start, start + batch)
                forward(pixels[rows], numbers[rows])
                if tick(batch):
                    return

    return _rate(steps, seconds, device, began)
