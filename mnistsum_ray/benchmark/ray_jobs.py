"""Measure this package's jobs as a user runs them, and the bare training loop inside a Ray Train worker."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from mnistsum_ray.benchmark.memory import BATCH
from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import ExportPairsConfig, TrainConfig
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.serialization import copy_weights, describe_model, save_model
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.storage.paths import locate

_FIRST_FILE_ROWS: Final = 1000


def run_job(command: str, *flags: object, name: str | None = None) -> dict[str, Any]:
    """Run `mnistsum COMMAND` and return its last line; the message of an error names it `name`."""
    return time_job(command, *flags, name=name)[0]


def time_job(command: str, *flags: object, name: str | None = None) -> tuple[dict[str, Any], float]:
    """Do as `run_job`; return also the seconds from the command to its last line, after which Ray's processes end."""
    started, seconds, last = time.perf_counter(), 0.0, ""
    with subprocess.Popen(
        [sys.executable, "-m", "mnistsum_ray", command, *map(str, flags)], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        try:
            for printed in job.stdout:
                last, seconds = printed, time.perf_counter() - started
        except BaseException:
            job.kill()
            raise
    if job.returncode:
        raise RunError(f"{name or command} could not be measured; see its error above")
    line: dict[str, Any] = json.loads(last)
    return line, seconds


def train(data: str, epochs: int) -> dict[str, float]:
    """Speed of jobs/train.py with one worker.

    The epochs after the first give the rate, the share of the time spent waiting for data, and the longest pause between epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", data, "--epochs", epochs, "--batch-size", BATCH, "--storage-path", folder, "--name", "benchmark"]
        command_time = time.time()
        run_job("train", *flags, "--num-workers", 1)
        lines = (Path(folder) / "benchmark" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    first, later = history[0], history[1:]
    seconds = sum(entry["seconds"] for entry in later)
    rows = sum(entry["rows_per_second"] * entry["seconds"] for entry in later)
    pauses = [
        after["started"] - (before["started"] + before["seconds"] + before["evaluation_seconds"])
        for before, after in pairwise(history)
    ]
    return {
        "rows_per_second": rows / seconds,
        "startup_seconds": first["started"] - command_time,
        "first_batch_seconds": first["first_batch_seconds"],
        "waiting": sum(entry["waiting"] * entry["seconds"] for entry in later) / seconds,
        "between_epochs_seconds": max(pauses),
    }


def score(data: str, rows: int, precision: str | None, calibration: tuple[Pixels, list[int]]) -> dict[str, float]:
    """Speed of jobs/score.py on `rows` rows, and the time from the command to the first committed file on 1,000 rows.

    Args:
        data: as for jobs/train.py.
        rows: number of rows for the rate.
        precision: value of --precision; None: unset.
        calibration: images and digits to calibrate the model for int8 with.
    """
    flags = ["--precision", precision] if precision else []
    if torch.cuda.is_available() and not precision:
        flags += ["--num-workers", "1"]  # one GPU, as the other ways use
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_random_model(folder / "model", *calibration)

        def measure(count: int, files: int) -> tuple[float, float]:
            pairs, output = folder / f"pairs-{count}", folder / f"predictions-{count}"
            export_pairs(ExportPairsConfig(data=data, output=str(pairs), rows=count, files=files), Console().say)
            command_time = time.time()
            line = run_job("score", "--model", folder / "model", "--input", pairs, "--output", output, *flags)
            assert line["scored_rows"] == count
            # An output file gets its final name right after its last byte, whose time is that of the file.
            written = [file.stat().st_mtime for pair in pairs.iterdir() for file in output.rglob(f"{pair.stem}*.parquet")]
            return line["rows_per_second"], min(written) - command_time

        rate, _ = measure(rows, min(8, rows))
        _, first_file = measure(_FIRST_FILE_ROWS, 1)
        return {"rows_per_second": rate, "first_file_seconds": first_file}


def _write_random_model(folder: Path, images: Pixels, digits: list[int]) -> None:
    """Write a model folder with random weights, calibrated for int8. Speed does not depend on the weights."""
    model = TwoHeadCNN().eval()
    description = describe_model(copy_weights(model), epoch=0, metrics={})
    if int8.unavailable_reason() is None:
        pixels, labels = torch.as_tensor(images[:500]), torch.as_tensor(digits[:500])
        description["int8"] = int8.quantize(model, pixels, pixels, labels)
    save_model(locate(str(folder), "--model"), copy_weights(model), description)


def train_in_worker(loop: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run a training loop in one Ray Train worker with the resources that jobs/train.py gives it."""
    import ray.train  # Ray takes a second to import, which would delay the start-up of the other ways

    from mnistsum_ray.cluster.resources import inspect_cluster
    from mnistsum_ray.training.resources import plan_resources
    from mnistsum_ray.training.worker import InterruptibleTrainer, cpus_of_node

    def worker(_: dict[str, Any]) -> dict[str, float]:
        torch.set_num_threads(cpus_of_node())
        return loop()

    connect()
    plan = plan_resources(TrainConfig(num_workers=1), inspect_cluster(), BATCH)
    with tempfile.TemporaryDirectory() as folder:
        trainer = InterruptibleTrainer(
            worker,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(num_workers=1, use_gpu=plan.use_gpu, resources_per_worker=plan.per_worker),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        measured: dict[str, float] = trainer.fit().return_value
        return measured
