"""Measure one way to train or to score, in a process of its own."""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from mnistsum_ray.benchmark import original
from mnistsum_ray.benchmark.process import Measurement, run_job
from mnistsum_ray.config import ExportPairsConfig, recipe_defaults
from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.parquet import open_parquet, to_parquet
from mnistsum_ray.data.sources import Digits, open_source
from mnistsum_ray.errors import RequestError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.model.device import enable_determinism, faster_with_bf16, tune_malloc
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import Objective, TwoHeadCNN, distort, pixel_places, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights, describe_model, save_model
from mnistsum_ray.reporting.report import epoch_end
from mnistsum_ray.storage.folder import empty_output

Steps = Iterator[int]
"""Works on a batch when it is asked for the next item, the number of the batch's rows; endless."""

_ROWS: Final = 16_384
"""Most rows that the ways without Ray Data hold in memory."""

_FILE_ROWS: Final = 4096
_WARM_UP_BATCHES: Final = 3
_FIRST_FILE_ROWS: Final = 1000


def measure(args: argparse.Namespace) -> Measurement:
    """Measure `args.way` of `args.what`; see `suite.parse`.

    Raises:
        RequestError: the data have too few rows.
    """
    what, way, device = args.what, args.way, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(args.data)
    if what == "accuracy":
        return original.measure_accuracy(source, device) | {"seconds": time.time() - args.command_time}
    if way == "ray" and what == "train":
        return _train_job(args.data, args.epochs or (20 if device.type == "cuda" else 2))
    images, digits = source.data.fetch(np.arange(min(source.rows, _ROWS)))
    if len(images) < original.BATCH:
        raise RequestError(f"--data {args.data}: has {len(images)} rows, fewer than a batch of {original.BATCH}")
    precision = "int8" if way.endswith("int8") else None
    if way.startswith("ray"):
        return _score_job(args.data, args.rows, precision, images)

    def loop() -> Measurement:
        if way == "loader":
            steps = _loader_steps(images, digits, device, training=what == "train")
        elif what == "train":
            steps = _training_steps(images, digits, device)
        else:
            steps = _scoring_steps(args.data, images, torch.device("cpu") if precision else device, precision)
        return _time_steps(steps, args.seconds, args.command_time)

    return _in_train_worker(loop) if way == "worker" else loop()


def _time_steps(steps: Steps, seconds: float, command_time: float) -> Measurement:
    """Measure until `seconds` after the warm-up, whose batches do not count towards the rate.

    `command_time`: when the command was given, in seconds since 1970.
    """

    def after(count: int) -> float:
        for _ in range(count):
            next(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    startup, requested = time.time() - command_time, time.perf_counter()
    first, started, rows = after(1) - requested, after(_WARM_UP_BATCHES - 1), 0
    while time.perf_counter() - started < seconds:
        rows += next(steps)
    return {"rows_per_second": rows / (after(0) - started), "startup_seconds": startup, "first_batch_seconds": first}


def _loader_steps(images: Pixels, digits: Digits, device: torch.device, *, training: bool) -> Steps:
    model = original.OriginalNet().to(device)
    step = original.training_step(model, device) if training else lambda batch: original.evaluate(model, device, batch)[0]
    loader = original.loader((images, digits), training=training)
    return (step(batch) for _ in itertools.count() for batch in loader)


def _training_steps(images: Pixels, digits: Digits, device: torch.device) -> Steps:
    """Training as in the job: distorted rows, and the package's model, loss and optimizer."""
    if device.type == "cpu":
        enable_determinism()
        tune_malloc()
    pixels, labels, places = torch.tensor(images).to(device), torch.tensor(digits, device=device).long(), pixel_places(device)
    matrices = torch.from_numpy(distortions(0, 0, np.arange(len(images)), recipe_defaults("short", small=False)["distortion"]))
    matrices = matrices.to(device)
    numbers = torch.randint(0, NUMBERS, (len(digits),), device=device)
    model = TwoHeadCNN().to(device)
    objective = Objective(model, 0.0, torch.bfloat16 if faster_with_bf16(device) else torch.float32)
    optimizer = MuonAdamW(model, 0.01, objective.dtype)
    optimizer.set_learning_rate(0.01)

    def step(rows: slice) -> int:
        optimizer.zero_grad()
        images = distort(prepare_images(pixels[rows]), matrices[rows], places)
        loss, _ = objective(images, numbers[rows], labels[rows], None)
        torch.autograd.backward(loss / original.BATCH)
        optimizer.step()
        return original.BATCH

    return map(step, _batches(len(images), original.BATCH))


def _scoring_steps(data: str, images: Pixels, device: torch.device, precision: str | None) -> Steps:
    """Files of pairs are read, predicted and written, as by a process that scores. A step is a file.

    A forward pass alone says little about such a job: on a card it takes less time than the files.
    """
    model = TwoHeadCNN().eval()
    maxima = int8.activation_maxima(model, torch.tensor(images[:256])) if precision else None
    precision = precision or ("bf16" if faster_with_bf16(device) else "fp32")
    predictor = Predictor(copy_weights(model), device, precision, None, maxima)
    with tempfile.TemporaryDirectory() as folder:
        pairs, _ = export_pairs(ExportPairsConfig(data=data, output=f"{folder}/in", rows=8 * _FILE_ROWS, files=8), print)
        output = empty_output(f"{folder}/out")
        for file in itertools.cycle(pairs.files()):
            with open_parquet(pairs.at(file.path)) as parquet:
                table = parquet.read()
            numbers = table["number"].to_numpy().astype(np.int64)
            columns = predictor.predict(pixels_view(one_chunk(table["image"])), numbers).columns(numbers)
            kept = {name: table[name] for name in ("row_id", "number", "digit")}
            output.write(file.name, to_parquet(pa.table(kept | dict(zip(PREDICTION_FIELDS.names, columns, strict=True)))))
            yield table.num_rows


def _batches(rows: int, batch: int) -> Iterator[slice]:
    """Whole batches, again and again."""
    return itertools.cycle([slice(start, start + batch) for start in range(0, rows - batch + 1, batch)])


def _train_job(data: str, epochs: int) -> Measurement:
    """Speed of `mnistsum train` with one worker; the first epoch does not count towards the rate and the waiting."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", data, "--epochs", epochs, "--batch-size", original.BATCH, "--num-workers", 1, "--sum-head-steps", 0]
        command_time = time.time()
        run_job("train", *flags, "--storage-path", folder, "--name", "benchmark")
        history = [json.loads(line) for line in (Path(folder) / "benchmark" / "history.jsonl").open()]
    seconds = [entry["seconds"] for entry in history[1:]]
    return {
        "rows_per_second": np.average([entry["rows_per_second"] for entry in history[1:]], weights=seconds),
        "startup_seconds": history[0]["started"] - command_time,
        "first_batch_seconds": history[0]["first_batch_seconds"],
        "waiting": np.average([entry["waiting"] for entry in history[1:]], weights=seconds),
        "between_epochs_seconds": max(after["started"] - epoch_end(entry) for entry, after in itertools.pairwise(history)),
    }


def _score_job(data: str, rows: int, precision: str | None, images: Pixels) -> Measurement:
    """Speed of `mnistsum score` on `rows` rows, and the time from the command to the first committed file on 1,000 rows.

    The model has random weights, on which the speed does not depend; `images` calibrate it for int8.
    """
    flags = ["--precision", precision] if precision else []
    model = TwoHeadCNN().eval()
    description = describe_model(copy_weights(model), epoch=0, metrics={})
    if precision:
        description["int8"] = {"maxima": int8.activation_maxima(model, torch.tensor(images[:256]))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(empty_output(str(folder / "model")), copy_weights(model), description)

        def score(count: int, files: int) -> tuple[float, float]:
            pairs, output = folder / f"pairs-{count}", folder / f"predictions-{count}"
            run_job("export-pairs", "--data", data, "--output", pairs, "--rows", count, "--files", files)
            command_time = time.time()
            (line,) = run_job("score", "--model", folder / "model", "--input", pairs, "--output", output, *flags)
            assert line["scored_rows"] == count
            # An output file gets its final name right after its last byte, whose time is that of the file.
            written = min(file.stat().st_mtime for file in (output / "predictions").rglob("*.parquet"))
            return line["rows_per_second"], written - command_time

        return {"rows_per_second": score(rows, min(8, rows))[0], "first_file_seconds": score(_FIRST_FILE_ROWS, 1)[1]}


def _in_train_worker(loop: Callable[[], Measurement]) -> Measurement:
    """Run a training loop in one Ray Train worker, with the threads of this process: Ray would set one."""
    import ray.train.torch  # takes a second, which would delay the start-up of the other ways

    from mnistsum_ray.cluster.connection import connect

    connect()
    threads = torch.get_num_threads()

    def worker() -> Measurement:
        torch.set_num_threads(threads)
        return loop()

    with tempfile.TemporaryDirectory() as folder:
        scaling = ray.train.ScalingConfig(use_gpu=torch.cuda.is_available())
        run = ray.train.RunConfig(storage_path=folder)
        measured: Measurement = ray.train.torch.TorchTrainer(worker, scaling_config=scaling, run_config=run).fit().return_value
    return measured
