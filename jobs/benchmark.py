"""Measure the speed of this project beside three other ways to train or to score.

python jobs/benchmark.py train --data FOLDER
python jobs/benchmark.py score --rows 400000

original  the way of the original: one row at a time through a DataLoader, float32, Adam
bare      this project's network and step on rows in memory, without Ray
guide     Ray's guides as they stand, with this project's network and step:
          https://docs.ray.io/en/latest/train/user-guides/data-loading-preprocessing.html
          https://docs.ray.io/en/latest/data/batch_inference.html
project   `fit` or `score`

Each way runs in a process of its own. Training: rows/s after the first epoch, one worker with all
cores. Scoring: rows/s of the whole command; `original` and `bare` loop over LOOP_ROWS.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.train.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, ToTensor

from mnistsum_ray import ScoreConfig, TrainConfig, fit, load_model, save_model, score
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.order import distortions
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import network
from mnistsum_ray.model.device import faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.optimizer import MuonAdamW

WAYS = ("original", "bare", "guide", "project")
ROWS = {"train": 20_000, "score": 400_000}
LOOP_ROWS = 10_000  # of a loop that scores
EPOCHS = 3
BATCH = 256
DISTORTION = 0.5  # as in the recipe `short`
CORES = os.cpu_count() or 1
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class OriginalRows(Dataset[tuple[Tensor, int, int]]):
    """Rows of (image, random number, digit), each made when it is read."""

    def __init__(self, folder: Path, count: int | None = None) -> None:
        self.images, self.digits = (values[:count] for values in read_rows(folder))
        normalize = Normalize((network.PIXEL_MEAN,), (network.PIXEL_STD,))
        self.transform = Compose([ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.transform(self.images[index][:, :, None])
        return image, int(torch.randint(0, 10, (1,))), int(self.digits[index])


class ProjectStep:
    """A step as in `fit`, on images uint8[n, 28, 28] and digits int64[n] on the device."""

    def __init__(self) -> None:
        tune_malloc()
        matrices = distortions(0, 0, np.arange(BATCH), DISTORTION)
        self.matrices = torch.from_numpy(matrices).to(DEVICE)
        self.dtype = torch.bfloat16 if faster_with_bf16(DEVICE) else torch.float32
        self.model = network.make_network().to(DEVICE)
        self.optimizer = MuonAdamW(self.model, 0.01, self.dtype)
        self.optimizer.set_learning_rate(0.01)

    def __call__(self, batch: Iterable[Tensor]) -> None:
        pixels, digits = batch
        self.optimizer.zero_grad()
        numbers = torch.randint(0, 10, digits.shape, device=DEVICE)
        matrices = self.matrices[: len(digits)]
        images = network.distort(network.prepare_images(pixels), matrices)
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(images, numbers)
        loss, _ = network.joint_loss(scores, digits, numbers)
        torch.autograd.backward(loss / BATCH)
        self.optimizer.step()


class Scorer:
    """The project's predictor of a batch; the actor of the guide."""

    def __init__(self, folder: Path) -> None:
        weights = load_model(folder / "model").state_dict()
        precision = "bf16" if faster_with_bf16(DEVICE) else "fp32"
        self.predictor = Predictor(weights, DEVICE, precision, None)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        numbers = batch["number"].astype(np.int64)
        found = self.predictor.predict(decode(batch["image"]), numbers)
        return {"row_id": batch["row_id"], "number": numbers, **found}


def decode(images: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(bytearray(b"".join(images)), np.uint8).reshape(-1, 28, 28)


def read_rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and digits of the rows that `main` has written."""
    table = pq.read_table(folder / "rows")  # noqa: TID251 - the benchmark's own files
    return decode(table["image"].to_pylist()), table["digit"].to_numpy().astype(np.int64)


def read_dataset(folder: Path) -> ray.data.Dataset:
    # Tasks that read and write need CPUs beside workers on all cores: else they wait for ever.
    ray.init(address="local", num_cpus=CORES + 3, log_to_driver=False)
    return ray.data.read_parquet(str(folder / "rows"))  # noqa: TID251 - it is what is measured


def timed(epochs: Iterable[Iterable[Any]], step: Callable[[Any], object]) -> float:
    """Take a step for each batch; return the rows per second without the first epoch."""
    rows, started = 0, 0.0
    for epoch, batches in enumerate(epochs):
        if epoch == 1:
            rows, started = 0, time.perf_counter()
        for batch in batches:
            step(batch)
            rows += len(batch[0])
    if CUDA:
        torch.cuda.synchronize()
    return rows / (time.perf_counter() - started)


def train_original(folder: Path) -> float:
    model = network.TwoHeadCNN().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: list[Tensor]) -> None:
        images, numbers, digits = (values.to(DEVICE) for values in batch)
        optimizer.zero_grad()
        digit_scores, sum_scores = model(images, numbers)
        loss = F.cross_entropy(digit_scores, digits) + F.cross_entropy(sum_scores, digits + numbers)
        torch.autograd.backward(loss / 2)
        optimizer.step()

    return timed([DataLoader(OriginalRows(folder), BATCH, shuffle=True)] * EPOCHS, step)


def train_bare(folder: Path) -> float:
    columns = [torch.tensor(values, device=DEVICE) for values in read_rows(folder)]
    batches = list(zip(*(torch.split(column, BATCH) for column in columns), strict=True))
    return timed([batches] * EPOCHS, ProjectStep())


def train_guide(folder: Path) -> float:
    def worker() -> float:
        torch.set_num_threads(CORES)  # Ray sets one, with which two cores train half as fast
        step = ProjectStep()
        step.model = ray.train.torch.prepare_model(step.model)
        shard = ray.train.get_dataset_shard("train")
        batches = shard.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=16 * BATCH)
        rate = timed((map(itemgetter("image", "digit"), batches) for _ in range(EPOCHS)), step)
        with tempfile.TemporaryDirectory() as checkpoint:
            torch.save(step.model.state_dict(), f"{checkpoint}/model.pt")
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(checkpoint))
        return rate

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": decode(batch["image"]), "digit": batch["digit"].astype(np.int64)}

    trainer = ray.train.torch.TorchTrainer(
        worker,
        scaling_config=ray.train.ScalingConfig(use_gpu=CUDA),
        run_config=ray.train.RunConfig(name="guide", storage_path=str(folder)),
        datasets={"train": read_dataset(folder).map_batches(prepared)},
    )
    return float(trainer.fit().return_value)


def train_project(folder: Path) -> float:
    settings: dict[str, Any] = {"data": str(folder / "rows"), "storage_path": str(folder)}
    settings |= {"epochs": EPOCHS, "batch_size": BATCH, "distortion": DISTORTION}
    config = TrainConfig(name="project", sum_head_steps=0, num_workers=1, **settings)
    return fit(config).images_per_second


def score_original(folder: Path) -> float:
    model = network.TwoHeadCNN().to(DEVICE).eval()

    @torch.inference_mode()
    def step(batch: list[Tensor]) -> None:
        for scores in model(batch[0].to(DEVICE), batch[1].to(DEVICE)):
            scores.argmax(1).cpu()

    return timed([DataLoader(OriginalRows(folder, LOOP_ROWS), BATCH)] * 2, step)


def score_bare(folder: Path) -> float:
    predictor = Scorer(folder).predictor
    torch.set_num_threads(CORES)  # the predictor has set one, since there is one for each core
    images, numbers = read_rows(folder)
    starts = range(0, min(len(images), LOOP_ROWS), BATCH)
    batches = [(images[start : start + BATCH], numbers[start : start + BATCH]) for start in starts]
    return timed([batches] * 2, lambda batch: predictor.predict(*batch))


def score_guide(folder: Path) -> None:
    pool = ray.data.ActorPoolStrategy(size=1 if CUDA else CORES)
    options = {"fn_constructor_args": [folder], "compute": pool, "num_gpus": int(CUDA)}
    scored = read_dataset(folder).map_batches(Scorer, batch_size=1024, **options)
    scored.write_parquet(str(folder / "guide"))


def score_project(folder: Path) -> None:
    model, rows, output = (str(folder / name) for name in ("model", "rows", "project"))
    score(ScoreConfig(model=model, input=(rows,), output=output))


def run_alone(way: str, *args: object) -> dict[str, float]:
    """Run one way in a process of its own; return its figures."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one GPU
    command = [sys.executable, __file__, *map(str, args), "--way", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # its error is on standard error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray prints too
    return dict(json.loads(lines[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--data", default="sample", help="as for jobs/train.py (default: sample)")
    parser.add_argument("--rows", type=int, help="to train with or to score (20000, 400000)")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # one alone, of rows in this folder
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    what, rows = args.what, args.rows or ROWS[args.what]
    if args.way:
        started = time.perf_counter()
        rate = globals()[f"{what}_{args.way}"](args.folder)  # None: all seconds count
        seconds = time.perf_counter() - started
        print(json.dumps({"rows_per_second": rate or rows / seconds, "seconds": seconds}))
        return
    with tempfile.TemporaryDirectory() as folder:
        pairs: dict[str, Any] = {"data": args.data, "split": "train", "rows": rows, "files": 8}
        say = partial(print, file=sys.stderr)
        export_pairs(ExportPairsConfig(**pairs, output=f"{folder}/rows"), say)
        save_model(network.make_network(), f"{folder}/model")  # the speed depends on no weights
        flags = (what, "--rows", rows, "--folder", folder)
        ways = {way: run_alone(way, *flags) for way in WAYS}
    print(f"{what:10}   rows_per_second           seconds       times_guide")
    for way, figures in ways.items():
        figures["times_guide"] = figures["rows_per_second"] / ways["guide"]["rows_per_second"]
        print(f"{way:10}" + "".join(f"{value:18,.1f}" for value in figures.values()))
    print(json.dumps({"what": what, "rows": rows, "cores": CORES, "gpu": CUDA, "ways": ways}))


if __name__ == "__main__":
    main()
