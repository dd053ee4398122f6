"""Measure the speed of this project beside four other ways to train or to score.

python jobs/benchmark.py train
python jobs/benchmark.py score --rows 400000
python jobs/benchmark.py train --task jobs/examples/shapes.py:Shapes     (without `original`)

original  the way of the original: one row at a time through a DataLoader, float32, Adam
bare      the task's network and this project's step on rows in memory, without Ray
guide     Ray's guides for Ray Train with Ray Data, and for batch inference, with the same network
          and step, and with the CPUs and threads that they need here
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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from random import randrange
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train.torch
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

from mnistsum_ray import (
    RowRandom,
    ScoreConfig,
    Task,
    TrainConfig,
    fit,
    load_model,
    save_model,
    score,
)
from mnistsum_ray.cluster.connection import send_by_value
from mnistsum_ray.data.columns.base import Arrays, Column, decode_columns
from mnistsum_ray.model.device import faster_with_bf16, tune_malloc
from mnistsum_ray.model.inference import Predictor, append_predictions
from mnistsum_ray.task import BUILT_IN, Batch
from mnistsum_ray.task_loader import load_task
from mnistsum_ray.training.worker import Objective

EPOCHS = 3
BATCH = 256
CORES = os.cpu_count() or 1
CUDA = torch.cuda.is_available()
SCORED_BATCH = 2048 if CUDA else 1024  # Ray Data's default; on a GPU the rows of one pass
DEVICE = torch.device("cuda" if CUDA else "cpu")


def precision_of(task: Task) -> Literal["bf16", "fp32"]:
    """Return the precision of all ways: the faster one here, if the task allows it."""
    return "bf16" if task.bf16 and faster_with_bf16(DEVICE) else "fp32"


def random_rows(task: Task, count: int) -> Arrays:
    """Return inputs and labels of this many rows, at most 10,000. Speed depends on no values."""
    generator, rows = np.random.default_rng(0), min(count, 10_000)
    columns = {**task.inputs, **task.labels}
    return {key: column.random(rows, generator) for key, column in columns.items()}


def decode(columns: Mapping[str, Column], table: pa.Table) -> Arrays:
    return decode_columns(columns, table, {key: key for key in columns})[0]


def timed(epochs: Iterable[Iterable[Any]], step: Callable[[Any], object]) -> float:
    """Take a step for each batch, a dict; return the rows per second without the first epoch."""
    rows, started = 0, 0.0
    for epoch, batches in enumerate(epochs):
        if epoch == 1:
            wait_for_device()
            rows, started = 0, time.perf_counter()
        for batch in batches:
            step(batch)
            rows += len(next(iter(batch.values())))
    wait_for_device()
    return rows / (time.perf_counter() - started)


def wait_for_device() -> None:
    if CUDA:
        torch.cuda.synchronize()


def project_step(task: Task) -> Callable[[Batch], None]:
    """Return a step as in `fit`, on a batch of inputs and labels on the device."""
    tune_malloc()
    augmented = task.augment(random_rows(task, BATCH), RowRandom(0, 0, np.arange(BATCH)))
    drawn = {key: torch.tensor(values, device=DEVICE) for key, values in augmented.items()}
    drawn["row_id"] = torch.arange(BATCH, device=DEVICE)
    bf16 = precision_of(task) == "bf16"
    network = task.network().to(DEVICE)
    objective = Objective(task, network, bf16=bf16)
    optimizer = task.optimizer(network, 0.01, bf16=bf16)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("lr_factor", 1.0)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        rows = len(next(iter(batch.values())))
        whole = {key: values[:rows] for key, values in drawn.items()} | batch
        torch.autograd.backward(objective(whole, rows) / BATCH)
        optimizer.step()

    return step


def original(task: Task, what: str, folder: str, rows: int) -> float:
    """Train or score on rows that are made when they are read, each with a random number."""
    is_training = what == "train"
    model = task.network().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters())

    def collate(rows: Any) -> Batch:
        made = [{"image": row[0], "number": randrange(10), "digit": row[1]} for row in rows]
        return dict(default_collate(made))

    def step(batch: Batch) -> None:
        batch = {key: values.to(DEVICE) for key, values in batch.items()}
        digit_logits, sum_logits = model(batch)
        if not is_training:
            digit_logits.argmax(1).cpu(), sum_logits.argmax(1).cpu()
            return
        optimizer.zero_grad()
        digits, sums = batch["digit"], batch["digit"] + batch["number"]
        loss = F.cross_entropy(digit_logits, digits) + F.cross_entropy(sum_logits, sums)
        torch.autograd.backward(loss / 2)
        optimizer.step()

    columns = random_rows(task, rows)
    pairs: Any = list(zip(columns["image"], columns["digit"], strict=True))
    batches = DataLoader(pairs, BATCH, shuffle=True, collate_fn=collate)
    with torch.set_grad_enabled(is_training):
        return timed([batches] * EPOCHS, step)


def bare(task: Task, what: str, folder: str, rows: int) -> float:
    size = BATCH if what == "train" else SCORED_BATCH
    columns = random_rows(task, rows)
    starts = range(0, len(next(iter(columns.values()))), size)
    arrays = [{key: c[start : start + size] for key, c in columns.items()} for start in starts]
    if what == "train":
        read, put = task.training_columns, partial(torch.tensor, device=DEVICE)
        batches = [{key: put(batch[key]) for key in read} for batch in arrays]
        return timed([batches] * EPOCHS, project_step(task))
    predictor = Scorer(task, folder).predictor
    torch.set_num_threads(CORES)  # the predictor has set one, since there is one for each core
    return timed([arrays] * EPOCHS, predictor.predict)


class Scorer:
    """The project's predictor of a batch; the actor of the guide."""

    def __init__(self, task: Task, folder: str) -> None:
        weights = load_model(f"{folder}/model", type(task)).state_dict()
        self.predictor = Predictor(task, weights, DEVICE, precision_of(task), None)

    def __call__(self, table: pa.Table) -> pa.Table:
        task = self.predictor.task
        found = self.predictor.predict(decode(task.inputs, table))
        wide = [key for key, column in task.inputs.items() if column.shape]
        return append_predictions(task, table.drop_columns(wide), found, {})


def guide(task: Task, what: str, folder: str, rows: int, *, is_tuned: bool = False) -> float | None:
    # Tasks that read and write need CPUs beside workers on all cores: else they wait for ever.
    ray.init(address="local", num_cpus=CORES + 3, log_to_driver=False)
    send_by_value(type(task))
    dataset = ray.data.read_parquet(f"{folder}/rows")  # noqa: TID251 - it is what is measured
    if what == "train":
        return train_by_guide(task, folder, dataset, is_tuned)
    if is_tuned:  # else Ray Data makes two blocks of 200,000 rows, of which one has most
        dataset = dataset.repartition(target_num_rows_per_block=4 * SCORED_BATCH)
    pool = ray.data.ActorPoolStrategy(size=1 if CUDA else CORES)
    options = {"fn_constructor_args": [task, folder], "compute": pool, "num_gpus": int(CUDA)}
    options |= {"batch_size": SCORED_BATCH, "batch_format": "pyarrow"}
    dataset.map_batches(Scorer, **options).write_parquet(f"{folder}/{is_tuned}")
    return None


def train_by_guide(task: Task, folder: str, dataset: ray.data.Dataset, is_tuned: bool) -> float:
    def worker() -> float:
        torch.set_num_threads(CORES)  # Ray sets one, with which two cores train half as fast
        shard = ray.train.get_dataset_shard("train")
        batches = shard.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=16 * BATCH)
        return timed((batches for _ in range(EPOCHS)), project_step(task))

    prepare = partial(decode, task.training_columns)
    prepared_rows = dataset.map_batches(prepare, batch_format="pyarrow")
    trainer = ray.train.torch.TorchTrainer(
        worker,
        scaling_config=ray.train.ScalingConfig(use_gpu=CUDA),
        run_config=ray.train.RunConfig(storage_path=folder),
        datasets={"train": prepared_rows.materialize() if is_tuned else prepared_rows},
    )
    return float(trainer.fit().return_value)


def project(task: Task, what: str, folder: str, rows: int) -> float | None:
    source, output = f"{folder}/rows", f"{folder}/out"
    if what == "train":
        settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "num_workers": 1}
        config = TrainConfig(task=type(task), data=source, storage_path=output, **settings)
        return fit(config).rows_per_second
    places = {"model": f"{folder}/model", "input": source, "output": output}
    score(ScoreConfig(task=type(task), precision=precision_of(task), **places))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument("what", choices=["train", "score"])
    parser.add_argument("--task", default=BUILT_IN, help="file.py:Class or module:Class")
    parser.add_argument("--rows", type=int, help="to train with or to score (20000, 400000)")
    args = parser.parse_args()
    rows = args.rows or {"train": 20_000, "score": 400_000}[args.what]
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one GPU
    kind = load_task(args.task)
    defaults, settings = kind().defaults(rows), kind.Settings.model_fields
    task = kind(kind.Settings(**{key: defaults[key] for key in settings if key in defaults}))
    tuned = partial(guide, is_tuned=True)
    ways: dict[str, Any] = {"bare": bare, "guide": guide, "tuned": tuned, "project": project}
    rates = {}
    with TemporaryDirectory() as folder:
        if args.task == BUILT_IN:
            ways = {"original": original} | ways
        columns, arrays = {**task.inputs, **task.labels}, random_rows(task, rows)
        table = pa.table({key: columns[key].to_arrow(arrays[key]) for key in columns})
        repeated = table.take(pa.array(np.arange(rows) % len(table)))
        Path(folder, "rows").mkdir()
        pq.write_table(repeated, f"{folder}/rows/all.parquet", row_group_size=8192)
        save_model(task.network(), f"{folder}/model", task)  # the speed depends on no weights
        for way, measure in ways.items():
            started = time.perf_counter()
            rate = measure(task, args.what, folder, rows)  # None: all seconds count
            rates[way] = rate or rows / (time.perf_counter() - started)
            ray.shutdown()
            print(f"{way:10}{rates[way]:12,.1f} rows/s", flush=True)
    print(json.dumps({"rows": rows, "cores": CORES, "gpu": CUDA, "rows_per_second": rates}))


if __name__ == "__main__":
    main()
