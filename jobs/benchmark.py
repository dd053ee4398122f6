"""Measure the speed of this project beside four other ways to train or to score.

python jobs/benchmark.py train
python jobs/benchmark.py score --rows 400000

original  the way of the original: one row at a time through a DataLoader, float32, Adam
bare      this project's network and step on rows in memory, without Ray
guide     Ray's guides for Ray Train with Ray Data, and for batch inference, with this project's
          network and step, and with the CPUs and threads that they need here
tuned     the same with one more call of Ray Data: `materialize` before the training, so that rows
          are decoded once, or `repartition` before the scoring, so that all actors have rows
project   `fit` or `score`

Training: rows/s after the first epoch, one worker with all cores. Scoring: rows/s with the start of
Ray and the writing of files. `original` and `bare` loop over 10,000 rows.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from operator import itemgetter
from random import randrange
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
import ray.train.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from mnistsum_ray import ScoreConfig, TrainConfig, fit, load_model, save_model, score
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.randomness import distortions
from mnistsum_ray.model import network
from mnistsum_ray.model.device import faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.pairs import export_pairs

EPOCHS = 3
BATCH = 256
CORES = os.cpu_count() or 1
CUDA = torch.cuda.is_available()
SCORED_BATCH = 2048 if CUDA else 1024  # Ray Data's default; on a GPU the rows of one pass
DEVICE = torch.device("cuda" if CUDA else "cpu")


def random_rows(count: int) -> tuple[Tensor, Tensor]:
    """Images uint8[n, 28, 28] and digits int64[n]: the speed depends on no values."""
    rows = min(count, 10_000)
    images = torch.randint(0, 256, (rows, 28, 28), dtype=torch.uint8)
    return images, torch.randint(0, 10, (rows,))


def decode(images: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(bytearray(b"".join(images)), np.uint8).reshape(-1, 28, 28)


def timed(epochs: Iterable[Iterable[Any]], step: Callable[..., object]) -> float:
    """Take a step for each batch; return the rows per second without the first epoch."""
    rows, started = 0, 0.0
    for epoch, batches in enumerate(epochs):
        if epoch == 1:
            if CUDA:
                torch.cuda.synchronize()
            rows, started = 0, time.perf_counter()
        for batch in batches:
            step(*batch)
            rows += len(batch[0])
    if CUDA:
        torch.cuda.synchronize()
    return rows / (time.perf_counter() - started)


def project_step() -> Callable[[Tensor, Tensor], None]:
    """A step as in `fit`, on images uint8[n, 28, 28] and digits int64[n] on the device."""
    tune_malloc()
    matrices = torch.from_numpy(distortions(0, 0, np.arange(BATCH), 0.5)).to(DEVICE)
    bf16 = faster_with_bf16(DEVICE)
    model = network.make_network().to(DEVICE)
    objective = network.Objective(model, 0.0, bf16=bf16)
    optimizer = MuonAdamW(model, 0.01, bf16=bf16)
    optimizer.set_learning_rate(0.01)

    def step(pixels: Tensor, digits: Tensor) -> None:
        optimizer.zero_grad()
        numbers = torch.randint(0, 10, digits.shape, device=DEVICE)
        images = network.distort(network.prepare_images(pixels), matrices[: len(digits)])
        loss, _ = objective(images, numbers, digits, None)
        torch.autograd.backward(loss / BATCH)
        optimizer.step()

    return step


def original(what: str, folder: str, rows: int) -> float:
    """A row is made when it is read, with a random number."""
    is_training = what == "train"
    model = network.TwoHeadCNN().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())

    def collate(rows: Any) -> Any:
        return default_collate([(image[None] / 255, randrange(10), digit) for image, digit in rows])

    def step(*batch: Tensor) -> None:
        images, numbers, digits = (values.to(DEVICE) for values in batch)
        digit_logits, sum_logits = model(images, numbers)
        if not is_training:
            digit_logits.argmax(1).cpu(), sum_logits.argmax(1).cpu()
            return
        optimizer.zero_grad()
        loss = F.cross_entropy(digit_logits, digits) + F.cross_entropy(sum_logits, digits + numbers)
        torch.autograd.backward(loss / 2)
        optimizer.step()

    pairs: Any = list(zip(*random_rows(rows), strict=True))
    batches = DataLoader(pairs, BATCH, shuffle=True, collate_fn=collate)
    with torch.set_grad_enabled(is_training):
        return timed([batches] * EPOCHS, step)


def bare(what: str, folder: str, rows: int) -> float:
    size = BATCH if what == "train" else SCORED_BATCH
    images, digits = (torch.split(column.to(DEVICE), size) for column in random_rows(rows))
    batches = list(zip(images, digits, strict=True))
    if what == "train":
        return timed([batches] * EPOCHS, project_step())
    predictor = Scorer(folder).predictor
    torch.set_num_threads(CORES)  # the predictor has set one, since there is one for each core
    arrays = [(images.cpu().numpy(), digits.cpu().numpy()) for images, digits in batches]
    return timed([arrays] * EPOCHS, predictor.predict)


class Scorer:
    """The project's predictor of a batch; the actor of the guide."""

    def __init__(self, folder: str) -> None:
        weights = load_model(f"{folder}/model").state_dict()
        precision = "bf16" if faster_with_bf16(DEVICE) else "fp32"
        self.predictor = Predictor(weights, DEVICE, precision, None)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        numbers = batch["number"].astype(np.int64)
        found = self.predictor.predict(decode(batch["image"]), numbers)
        return {"row_id": batch["row_id"], "number": numbers, **found}


def guide(what: str, folder: str, rows: int, *, is_tuned: bool = False) -> float | None:
    # Tasks that read and write need CPUs beside workers on all cores: else they wait for ever.
    ray.init(address="local", num_cpus=CORES + 3, log_to_driver=False)
    dataset = ray.data.read_parquet(f"{folder}/rows")  # noqa: TID251 - it is what is measured
    if what == "train":
        return train_by_guide(folder, dataset, is_tuned)
    if is_tuned:  # else Ray Data makes two blocks of 200,000 rows, of which one has most
        dataset = dataset.repartition(target_num_rows_per_block=4 * SCORED_BATCH)
    pool = ray.data.ActorPoolStrategy(size=1 if CUDA else CORES)
    options = {"fn_constructor_args": [folder], "compute": pool, "num_gpus": int(CUDA)}
    scored = dataset.map_batches(Scorer, batch_size=SCORED_BATCH, **options)
    scored.write_parquet(f"{folder}/{is_tuned}")
    return None


def tuned(what: str, folder: str, rows: int) -> float | None:
    return guide(what, folder, rows, is_tuned=True)


def train_by_guide(folder: str, dataset: ray.data.Dataset, is_tuned: bool) -> float:
    def worker() -> float:
        torch.set_num_threads(CORES)  # Ray sets one, with which two cores train half as fast
        shard = ray.train.get_dataset_shard("train")
        batches = shard.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=16 * BATCH)
        epochs = (map(itemgetter("image", "digit"), batches) for _ in range(EPOCHS))
        return timed(epochs, project_step())

    def prepared(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": decode(batch["image"]), "digit": batch["digit"].astype(np.int64)}

    prepared_rows = dataset.map_batches(prepared)
    trainer = ray.train.torch.TorchTrainer(
        worker,
        scaling_config=ray.train.ScalingConfig(use_gpu=CUDA),
        run_config=ray.train.RunConfig(storage_path=folder),
        datasets={"train": prepared_rows.materialize() if is_tuned else prepared_rows},
    )
    return float(trainer.fit().return_value)


def project(what: str, folder: str, rows: int) -> float | None:
    source, output = f"{folder}/rows", f"{folder}/out"
    if what == "train":
        settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "distortion": 0.5}
        config = TrainConfig(data=source, storage_path=output, num_workers=1, **settings)
        return fit(config).images_per_second
    score(ScoreConfig(model=f"{folder}/model", input=(source,), output=output))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--rows", type=int, help="to train with or to score (20000, 400000)")
    args = parser.parse_args()
    rows = args.rows or {"train": 20_000, "score": 400_000}[args.what]
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one GPU
    ways = {}
    with TemporaryDirectory() as folder:
        pairs = ExportPairsConfig(data="sample", rows=rows, output=f"{folder}/rows")
        export_pairs(pairs, print)
        save_model(network.make_network(), f"{folder}/model")  # the speed depends on no weights
        for measure in (original, bare, guide, tuned, project):
            started = time.perf_counter()
            rate = measure(args.what, folder, rows)  # None: all seconds count
            way = measure.__name__
            ways[way] = rate or rows / (time.perf_counter() - started)
            ray.shutdown()
            print(f"{way:10}{ways[way]:12,.1f} rows/s", flush=True)
    print(json.dumps({"rows": rows, "cores": CORES, "gpu": CUDA, "rows_per_second": ways}))


if __name__ == "__main__":
    main()
