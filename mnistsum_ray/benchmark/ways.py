"""Measure one way to train or to score."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mnistsum_ray.benchmark import original
from mnistsum_ray.cluster.resources import workers_per_gpu
from mnistsum_ray.config import recipe_defaults
from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_array, pixels_view
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.data.sources import Digits, open_source
from mnistsum_ray.errors import RunError, UnusableFileError
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import Objective, distort, make_network, pixel_places, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights, describe_model, load_model, save_model
from mnistsum_ray.storage.folder import empty_output
from mnistsum_ray.storage.paths import locate

Measurement = dict[str, float]
"""Figures of one way, as mnistsum_ray/benchmark/README.md explains them."""

Steps = Iterator[int]
"""Works on a batch when it is asked for the next item, the number of the batch's rows; endless."""

_DEVICE: Final = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_EPOCHS: Final = 20 if torch.cuda.is_available() else 2


def measure(args: argparse.Namespace) -> Measurement:
    """Measure `args.way` of `args.what`; see `suite.parse`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.way == "ray" and args.what != "score":
            return _train(args, folder) if args.what == "train" else _accuracy(args, folder)
        source = open_source(args.data)
        if args.what == "accuracy":
            return original.measure_accuracy(source, _DEVICE) | {"seconds": time.time() - args.started}
        images, digits = source.data.fetch(np.arange(min(source.rows, 16_384)))
        if args.way in ("loader", "memory"):
            return _time_steps(_steps(args, images, digits), args)
        write_rows(folder / "in", images, digits, len(images) if args.what == "train" else args.rows)
        if args.what == "train":
            return _train_guide(folder)
        weights = copy_weights(make_network())  # random ones, on which the speed does not depend
        save_model(empty_output(f"{folder}/model"), weights, describe_model(weights, epoch=0, metrics={}))
        return _score_bare(args, folder) if args.way == "files" else _score(args, folder)


def _time_steps(steps: Steps, args: argparse.Namespace) -> Measurement:
    """Measure until `args.seconds` after three batches, which do not count towards the rate."""

    def after(count: int) -> float:
        for _ in range(count):
            next(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()

    first = after(1)
    started = after(2)
    rows = 0
    while time.time() - started < args.seconds:
        rows += next(steps)
    return {"rows_per_second": rows / (after(0) - started), "first_row_seconds": first - args.started}


def _steps(args: argparse.Namespace, images: Pixels, digits: Digits) -> Steps:
    if args.way == "memory":
        pixels, labels = torch.tensor(images).to(_DEVICE), torch.tensor(digits, device=_DEVICE).long()
        batches = zip(torch.split(pixels, original.BATCH), torch.split(labels, original.BATCH), strict=True)
        return itertools.starmap(TrainingStep(_DEVICE), itertools.cycle(batches))
    model, loader = original.Original(_DEVICE), original.loader((images, digits), training=True)
    return (model.train(batch) for _ in itertools.count() for batch in loader)


class TrainingStep:
    """A step of training as in the job: distorted rows, and the package's model, loss and optimizer."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            enable_determinism()
            tune_malloc()
        strength = recipe_defaults("short", small=False)["distortion"]
        self.matrices = torch.from_numpy(distortions(0, 0, np.arange(original.BATCH), strength)).to(device)
        self.model, self.places = make_network().to(device), pixel_places(device)
        dtype = torch.bfloat16 if faster_with_bf16(device) else torch.float32
        self.objective: nn.Module = Objective(self.model, 0.0, dtype)
        self.optimizer = MuonAdamW(self.model, 0.01, dtype)
        self.optimizer.set_learning_rate(0.01)

    def __call__(self, pixels: Tensor, digits: Tensor) -> int:
        """Train with a batch on the device, uint8[n, 28, 28] and int64[n]; return n."""
        self.optimizer.zero_grad()
        numbers = torch.randint(0, NUMBERS, (len(digits),), device=digits.device)
        images = distort(prepare_images(pixels), self.matrices[: len(digits)], self.places)
        loss, _ = self.objective(images, numbers, digits, None)
        torch.autograd.backward(loss / original.BATCH)
        self.optimizer.step()
        return len(digits)


def write_rows(folder: Path, images: Pixels, digits: Digits, rows: int) -> None:
    """Write so many rows as Parquet, the images again and again: `id` (each is another), `image`, `number` and `digit`."""
    folder.mkdir()
    for index, ids in enumerate(np.array_split(np.arange(rows), 8)):
        places = ids % len(images)
        columns = {"id": ids, "image": pixels_array(images[places]), "number": (ids % NUMBERS).astype(np.int8)}
        pq.write_table(pa.table(columns | {"digit": digits[places]}), folder / f"part-{index}.parquet", row_group_size=8192)


def _accuracy(args: argparse.Namespace, folder: Path) -> Measurement:
    started = time.time()
    test = run_job("train", "--data", args.data, "--recipe", "quick", "--seed", args.seed, "--storage-path", folder)["test"]
    return {key: test[key] for key in ("digit_accuracy", "sum_accuracy")} | {"seconds": time.time() - started}


def _train(args: argparse.Namespace, folder: Path) -> Measurement:
    """Speed of `mnistsum train` with one worker; the first epoch does not count towards the rate and the waiting."""
    flags = ["--data", args.data, "--epochs", _EPOCHS, "--batch-size", original.BATCH, "--num-workers", 1, "--sum-head-steps", 0]
    started = time.time()
    run_job("train", *flags, "--storage-path", folder, "--name", "run")
    first, *others = (json.loads(line) for line in (folder / "run" / "history.jsonl").open())
    means = {name: float(np.mean([entry[name] for entry in others])) for name in ("rows_per_second", "waiting")}
    return means | {"first_row_seconds": first["started"] + first["first_batch_seconds"] - started}


def _train_guide(folder: Path) -> Measurement:
    started = time.time()
    line = run_job("train", folder / "in", folder / "runs", _EPOCHS, module="mnistsum_ray.benchmark.guides")
    return {"rows_per_second": line["rows_per_second"], "first_row_seconds": line["first_row"] - started}


def _score_bare(args: argparse.Namespace, folder: Path) -> Measurement:
    """The rate of as many processes as the job has, added, without Ray."""
    count = os.cpu_count() or 1
    if torch.cuda.is_available():
        count = workers_per_gpu(torch.cuda.get_device_properties(0).total_memory, count)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(partial(score_files, args, folder), range(count)))
    return {
        "rows_per_second": sum(figures["rows_per_second"] for figures in measured),
        "first_row_seconds": min(figures["first_row_seconds"] for figures in measured),
    }


def load_predictor(model: Path | str) -> Predictor:
    network, _ = load_model(locate(str(model), "--model"))
    return Predictor(copy_weights(network), _DEVICE, "bf16" if faster_with_bf16(_DEVICE) else "fp32", None)


def score_files(args: argparse.Namespace, folder: Path, index: int) -> Measurement:
    """Read files of pairs, predict and write predictions, as a process that scores; a step is a file.

    A forward pass alone says little about such a job: on a card it takes less time than the files.
    """
    predictor, output = load_predictor(folder / "model"), empty_output(f"{folder}/out-{index}")

    def steps() -> Steps:
        for file in itertools.cycle(sorted((folder / "in").iterdir())):
            table = read_table(locate(str(file), "--input"))
            numbers = table["number"].to_numpy().astype(np.int64)
            columns = predictor.predict(pixels_view(one_chunk(table["image"])), numbers).columns(numbers)
            kept = {name: table[name] for name in ("id", "number", "digit")}
            output.write(file.name, to_parquet(pa.table(kept | dict(zip(PREDICTION_FIELDS.names, columns, strict=True)))))
            yield len(numbers)

    return _time_steps(steps(), args)


def _score(args: argparse.Namespace, folder: Path) -> Measurement:
    """Run the command of `mnistsum score`, or of the guide; with `--kill` it is begun and killed before."""
    output = folder / "out"
    module, command = "mnistsum_ray", ["score", "--input", folder / "in", "--output", output, "--model", folder / "model"]
    if args.way == "guide":
        module, command = "mnistsum_ray.benchmark.guides", ["score", folder / "in", output, folder / "model"]

    def written() -> list[Path]:
        return list((output / "predictions").glob("[!.]*.parquet"))

    if args.kill:
        with subprocess.Popen([sys.executable, "-m", module, *map(str, command)], stdout=subprocess.DEVNULL) as job:
            try:
                while not written() and job.poll() is None:
                    time.sleep(0.01)
            finally:
                job.kill()
    started = time.time()
    line = run_job(*command, module=module)
    seconds, ids = time.time() - started, list[int]()
    for file in written():
        with suppress(UnusableFileError):  # no rows in a torn file
            ids += read_table(locate(str(file), "--output"), ["id"])["id"].to_pylist()
    return {
        "rows_per_second": line.get("rows_per_second") or args.rows / line["seconds"],
        # An output file gets its final name right after its last byte, whose time is that of the file.
        "first_row_seconds": min(file.stat().st_mtime for file in written()) - started,
        "command_seconds": seconds,
        "rows_lost": args.rows - len(set(ids)),
        "rows_repeated": len(ids) - len(set(ids)),
    }


def run_job(*arguments: object, module: str = "mnistsum_ray") -> dict[str, Any]:
    """Run `mnistsum`, or another module, as a user does, and return the JSON object that it prints last; RunError if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command[2:])} failed; see its error above")
    result: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return result  # Ray Data writes other lines, too
