"""Measure one way to train or to score, in a process of its own."""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mnistsum_ray.benchmark import memory, original
from mnistsum_ray.benchmark.memory import Measurement, time_batches
from mnistsum_ray.benchmark.suite import run_job
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.serialization import copy_weights, describe_model, save_model
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.storage.paths import locate

_ROWS: Final = 16_384
"""Most rows that the ways without Ray Data hold in memory."""

_FIRST_FILE_ROWS: Final = 1000


def measure(args: argparse.Namespace) -> Measurement:
    """Measure `args.way` of `args.what`; see `suite.parse`.

    Raises:
        RequestError: the data have too few rows.
    """
    what, way, device = args.what, args.way, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if what == "accuracy":
        accuracies = original.measure_accuracy(open_source(args.data), device)
        return accuracies | {"seconds": time.time() - args.command_time}
    if way == "ray" and what == "train":
        return _train_job(args.data, args.epochs or (20 if device.type == "cuda" else 2))
    images, digits = _read_rows(args.data)
    if way.startswith("ray"):
        return _score_job(args.data, args.rows, "int8" if way == "ray-int8" else None, images, digits)

    def loop() -> Measurement:
        if what == "score" and way != "loader":
            precision = "int8" if way == "memory-int8" else None
            return memory.score(images, args.seconds, torch.device("cpu") if precision else device, precision, args.command_time)
        if way != "loader":
            batches = memory.train(images, digits, device)
        elif what == "train":
            _, batches = original.train(original.OriginalDataset(images, digits), device)
        else:
            rows, model = original.OriginalDataset(images, digits), original.OriginalNet()
            batches = (count for _ in itertools.count() for count, _, _ in original.score(rows, model, device))
        return time_batches(batches, args.seconds, device, args.command_time)

    return _in_train_worker(loop) if way == "worker" else loop()


def _read_rows(data: str) -> tuple[Pixels, list[int]]:
    """Images uint8[n, 28, 28] and digits of the first rows of a source."""
    source = open_source(data)
    images, digits = source.data.fetch(np.arange(min(source.rows, _ROWS)))
    if len(images) < original.BATCH:
        raise RequestError(f"--data {data}: has {len(images)} rows, fewer than a batch of {original.BATCH}")
    return images, digits.tolist()


def _train_job(data: str, epochs: int) -> Measurement:
    """Speed of `mnistsum train` with one worker.

    The epochs after the first give the rate, the share of the time spent waiting for data, and the longest pause between epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", data, "--epochs", epochs, "--batch-size", original.BATCH, "--num-workers", 1]
        command_time = time.time()
        run_job("train", *flags, "--storage-path", folder, "--name", "benchmark")
        lines = (Path(folder) / "benchmark" / "history.jsonl").read_text().splitlines()
    first, *later = history = [json.loads(line) for line in lines]
    seconds = sum(entry["seconds"] for entry in later)
    ends = [entry["started"] + entry["seconds"] + entry["evaluation_seconds"] for entry in history]
    return {
        "rows_per_second": sum(entry["rows_per_second"] * entry["seconds"] for entry in later) / seconds,
        "startup_seconds": first["started"] - command_time,
        "first_batch_seconds": first["first_batch_seconds"],
        "waiting": sum(entry["waiting"] * entry["seconds"] for entry in later) / seconds,
        "between_epochs_seconds": max(entry["started"] - end for entry, end in zip(later, ends, strict=False)),
    }


def _score_job(data: str, rows: int, precision: str | None, images: Pixels, digits: list[int]) -> Measurement:
    """Speed of `mnistsum score` on `rows` rows, and the time from the command to the first committed file on 1,000 rows.

    The model has random weights, on which the speed does not depend; `images` and `digits` calibrate it for int8.
    """
    flags = ["--precision", precision] if precision else []
    if torch.cuda.is_available() and not precision:
        flags += ["--num-workers", "1"]  # one GPU, as the other ways use
    model = TwoHeadCNN().eval()
    description = describe_model(copy_weights(model), epoch=0, metrics={})
    if precision:
        pixels, labels = torch.tensor(images[:500]), torch.tensor(digits[:500])
        description["int8"] = int8.quantize(model, pixels, pixels, labels)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(locate(str(folder / "model"), "--model"), copy_weights(model), description)

        def score(count: int, files: int) -> tuple[float, float]:
            pairs, output = folder / f"pairs-{count}", folder / f"predictions-{count}"
            export_pairs(ExportPairsConfig(data=data, output=str(pairs), rows=count, files=files), Console().say)
            command_time = time.time()
            line, _ = run_job("score", "--model", folder / "model", "--input", pairs, "--output", output, *flags)
            assert line["scored_rows"] == count
            # An output file gets its final name right after its last byte, whose time is that of the file.
            written = [file.stat().st_mtime for pair in pairs.iterdir() for file in output.rglob(f"{pair.stem}*.parquet")]
            return line["rows_per_second"], min(written) - command_time

        rate, _ = score(rows, min(8, rows))
        _, first_file = score(_FIRST_FILE_ROWS, 1)
    return {"rows_per_second": rate, "first_file_seconds": first_file}


def _in_train_worker(loop: Callable[[], Measurement]) -> Measurement:
    """Run a training loop in one Ray Train worker with all CPUs, or one GPU."""
    import ray.train.torch  # takes a second, which would delay the start-up of the other ways

    from mnistsum_ray.cluster.connection import connect

    connect()
    cpus = int(ray.cluster_resources()["CPU"])

    def worker(_: dict[str, Any]) -> Measurement:
        torch.set_num_threads(cpus)
        return loop()

    with tempfile.TemporaryDirectory() as folder:
        trainer = ray.train.torch.TorchTrainer(
            worker,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=torch.cuda.is_available()),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        measured: Measurement = trainer.fit().return_value
    return measured
