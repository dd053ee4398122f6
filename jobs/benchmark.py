"""Our speed beside plain PyTorch, in one run on one machine: training rows a second in steady state.

    python jobs/benchmark.py train --data FOLDER

Four ways, each in a process of its own, once in this order and once backwards, since a machine's speed drifts:

    loader    the original's way: torchvision's dataset row by row through a DataLoader, float32, PyTorch's default layout
    memory    our model, precision, threads and optimizer on float tensors that already lie in memory, nothing else running
    worker    the same loop on the same tensors, but in a Ray Train worker: what is left between it and ray is the data's doing
    ray       jobs/train.py as it is; the first epoch is left out

The last line on standard output is one JSON object.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray import job
from mnistsum_ray.config import Refusal, TrainConfig
from mnistsum_ray.loop import be_deterministic, faster_with_bf16, use_cores
from mnistsum_ray.mnist import ParquetPart, open_source
from mnistsum_ray.model import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN, joint_loss, prepare_images
from mnistsum_ray.report import Console
from mnistsum_ray.schema import PIXELS, Pixels, pixels_view

BATCH = 256
WAYS = ("loader", "memory", "worker", "ray")


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


def loader_loop(images: Pixels, digits: list[int], seconds: float, device: torch.device) -> float:
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

    return _rate(steps, seconds, device)


def memory_loop(images: Pixels, digits: list[int], seconds: float, device: torch.device) -> float:
    if device.type == "cpu":
        be_deterministic()
    ready = prepare_images(torch.tensor(images)).to(device)
    truth = torch.tensor(digits, device=device)
    numbers = torch.randint(0, 10, (len(digits),), device=device)
    model = TwoHeadCNN().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    bf16 = faster_with_bf16(device)

    def steps(tick: Callable[[int], bool]) -> None:
        while True:
            for start in range(0, len(ready) - BATCH + 1, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    digit_scores, sum_scores = model(ready[rows], numbers[rows])
                torch.autograd.backward(joint_loss(digit_scores, sum_scores, truth[rows], numbers[rows]) / BATCH)
                optimizer.step()
                if tick(BATCH):
                    return

    return _rate(steps, seconds, device)


def _rate(steps: Callable[[Callable[[int], bool]], None], seconds: float, device: torch.device) -> float:
    """Rows a second after a warm-up of three steps."""
    seen, rows, started = 0, 0, 0.0

    def tick(count: int) -> bool:
        nonlocal seen, rows, started
        seen += 1
        if seen <= 3:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            return False
        rows += count
        return time.perf_counter() - started > seconds

    steps(tick)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return rows / (time.perf_counter() - started)


def ray_loop(data: str, epochs: int) -> tuple[float, float]:
    """Rows a second, and the share of the time spent waiting for data, over all epochs but the first."""
    from mnistsum_ray.train import fit, prepare

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(data=data, epochs=epochs, batch_size=BATCH, max_shift=2, storage_path=folder, name="benchmark")
        job.connect()
        with contextlib.redirect_stdout(sys.stderr):
            fit(prepare(config), Console())
        lines = (Path(folder) / "benchmark" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines[1:]]
    seconds = sum(entry["seconds"] for entry in history)
    rows = sum(entry["rows_per_second"] * entry["seconds"] for entry in history)
    return rows / seconds, sum(entry["waiting"] * entry["seconds"] for entry in history) / seconds


def worker_loop(data: str, seconds: float) -> float:
    """`memory_loop` in a Ray Train worker with the resources and the environment that jobs/train.py gives it."""
    import ray

    from mnistsum_ray.resources import allot, look
    from mnistsum_ray.train import KEEP_MEMORY

    def loop(_: dict[str, Any]) -> float:
        use_cores(1)
        return one("memory", data, seconds, 0)["rows_per_second"]

    job.connect()
    allotment = allot(TrainConfig(num_workers=1), look())
    with tempfile.TemporaryDirectory() as folder:
        trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=allotment.use_gpu, resources_per_worker=allotment.per_worker
            ),
            run_config=ray.train.RunConfig(storage_path=folder, worker_runtime_env={"env_vars": KEEP_MEMORY}),
        )
        return float(trainer.fit().return_value)


def one(way: str, data: str, seconds: float, epochs: int) -> dict[str, float]:
    """Measure one way in this process."""
    if way == "ray":
        rate, waiting = ray_loop(data, epochs)
        return {"rows_per_second": rate, "waiting": waiting}
    if way == "worker":
        return {"rows_per_second": worker_loop(data, seconds)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = [part.read() if isinstance(part, ParquetPart) else part for part in open_source(data).parts[:2]]
    images = torch.cat([torch.tensor(pixels_view(table["image"].combine_chunks())) for table in tables]).numpy()
    digits = [digit for table in tables for digit in table["digit"].to_pylist()]
    assert images[0].size == PIXELS
    loop = loader_loop if way == "loader" else memory_loop
    return {"rows_per_second": loop(images, digits, seconds, device)}


def train(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--data", default="auto", help="as for jobs/train.py (default: auto)")
    parser.add_argument("--seconds", type=float, default=20, help="length of each loop that is not Ray's (default: 20)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each Ray run, the first uncounted (default: 3)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.epochs < 2:
        raise Refusal("--epochs: must be at least 2, the first is not counted")
    if args.way:
        return one(args.way, args.data, args.seconds, args.epochs)

    from mnistsum_ray.train import KEEP_MEMORY

    results: dict[str, list[dict[str, float]]] = {}
    for way in (*WAYS, *reversed(WAYS)):
        environment = os.environ | KEEP_MEMORY if way == "memory" else os.environ
        command = [sys.executable, __file__, *argv, "--way", way]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise Refusal(f"{way} could not be measured; its error stands above")
        result = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(way, []).append(result)
        print(f"{way}: {result['rows_per_second']:,.0f} rows/s", file=sys.stderr, flush=True)
    rates = {way: sum(r["rows_per_second"] for r in of_way) / len(of_way) for way, of_way in results.items()}
    return {
        "rows_per_second": {way: round(rate, 1) for way, rate in rates.items()},
        "beside_loader": round(rates["ray"] / rates["loader"], 3),
        "beside_memory": round(rates["ray"] / rates["memory"], 3),
        "beside_memory_in_worker": round(rates["ray"] / rates["worker"], 3),
        "waiting": round(sum(r["waiting"] for r in results["ray"]) / len(results["ray"]), 4),
        "runs": {way: [round(r["rows_per_second"], 1) for r in of_way] for way, of_way in results.items()},
    }


def main(argv: list[str]) -> int:
    return job.run(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
