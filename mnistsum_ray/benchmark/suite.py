"""Measure the speed of training or scoring beside plain PyTorch, or of the training pipeline alone;
or the time to the original's accuracy.

    mnistsum benchmark train --data FOLDER
    mnistsum benchmark score --data FOLDER
    mnistsum benchmark feed --data FOLDER
    mnistsum benchmark accuracy --data FOLDER --repeat 5

Each way is measured in its own process, several times, in alternating order:

    loader       the original's way: torchvision's dataset row by row through a DataLoader, float32
    memory       this package's model on tensors in memory; for training with the same threads and
                 optimizer, for scoring with the fastest batch size and number of processes
    memory-int8  (score) the same with 8-bit integers
    worker       (train) the loop of memory in a Ray Train worker; the difference to ray is the
                 cost of the data pipeline
    ray          mnistsum train or mnistsum score
    ray-int8     (score) mnistsum score --precision int8

`feed` hands rows to a worker that does not train: from memory, or streamed from Parquet of raw
bytes (stream) or PNG (stream-png). `accuracy` measures the time from the command to a model that
is as accurate as the original after its five epochs, with the recipe `quick` and `--repeat` seeds,
beside the original's way.

The table on standard error holds medians, with minimum and maximum in parentheses;
mnistsum_ray/benchmark/README.md explains the figures. The last line on standard output is one JSON
object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mnistsum_ray.benchmark import accuracy, feed, memory, original, ray_jobs
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model import int8
from mnistsum_ray.model.device import hardware
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.paths import locate

WAYS: Final = {
    "train": ("loader", "memory", "worker", "ray"),
    "score": ("loader", "memory", "memory-int8", "ray", "ray-int8"),
    "feed": ("memory", "stream", "stream-png"),
    "accuracy": ("loader",),
}
RATIOS: Final = {
    "train": (("ray", "memory"), ("ray", "worker"), ("ray", "loader")),
    "score": (("ray", "memory"), ("ray", "loader"), ("ray-int8", "memory-int8"), ("ray-int8", "loader")),
    "feed": (("stream", "memory"), ("stream-png", "memory")),
}

Measurement = dict[str, float]


def benchmark(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Run the benchmark, or with `--way` one measurement.

    Args:
        args: from `parse`.
        argv: the command line, for the processes that measure.

    Returns:
        The fields of the job's last line.

    Raises:
        RequestError: the data have too few rows.
        RunError: a measurement failed.
    """
    if args.what == "accuracy" and not args.way:
        line = accuracy.measure(argv, args.data, args.repeat)
        return line | {"hardware": hardware(_device()), "versions": versions()}
    if args.way:
        return _measure(args)
    ways = WAYS[args.what]
    if args.what == "score" and int8.unavailable_reason():
        print("int8 is left out: this PyTorch has no integer convolutions on this CPU", file=sys.stderr)
        ways = tuple(way for way in ways if not way.endswith("int8"))
    runs: dict[str, list[Measurement]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "feed":
            _write_feed(args, Path(folder))
        for turn in range(args.repeat):
            # Every other turn goes backwards, so that a drift of the machine's speed hits all ways alike.
            for way in ways if turn % 2 == 0 else reversed(ways):
                hidden = ("--way", way, "--command-time", time.time(), "--folder", folder)
                result = ray_jobs.run_job("benchmark", *argv, *hidden, name=way)
                runs[way].append(result)
                print(f"{way}: {result['rows_per_second']:,.0f} rows/s", file=sys.stderr, flush=True)
    line = _summary(args.what, runs)
    print(_table(runs, line["ratios"]), file=sys.stderr, flush=True)
    return line


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        RequestError: a flag is invalid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--data", default="auto", help="as for mnistsum train (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each way; accuracy: seeds (default: 3)")
    parser.add_argument("--seconds", type=float, default=15, help="length of a measurement without Ray's jobs (default: 15)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=20 if torch.cuda.is_available() else 2,
        help="train: epochs of mnistsum train, the first of which does not count (default: 2; 20 on a GPU)",
    )
    parser.add_argument("--rows", type=int, default=400_000, help="score, feed: rows (default: 400000)")
    parser.add_argument("--shuffle-rows", type=int, default=100_000, help="feed: as for mnistsum train (default: 100000)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=sorted({way for ways in WAYS.values() for way in ways}), help=argparse.SUPPRESS)
    parser.add_argument("--command-time", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.epochs < 2:
        raise RequestError("--epochs: must be at least 2, since the first does not count")
    if args.what == "feed" and args.way and not args.folder:
        raise RequestError("--way: feed measures all ways, on files that it writes first; leave the flag out")
    if min(args.repeat, args.rows, args.shuffle_rows) < 1 or args.seconds <= 0:
        raise RequestError("--repeat, --seconds, --rows, --shuffle-rows: must be positive")
    if args.what == "feed" and args.rows <= args.shuffle_rows:
        raise RequestError("--rows: must be more than --shuffle-rows, or nothing would be streamed")
    if args.data not in ("auto", "sample", "mnist") and "://" not in args.data:
        args.data = locate(args.data, "--data").display  # an absolute path: Ray's workers have another working directory
    return args


def _measure(args: argparse.Namespace) -> Measurement:
    """Measure one way in this process."""
    if args.what == "accuracy":
        return accuracy.train_original(args.data, _device(), args.command_time)
    if args.what == "feed":
        rows = args.folder / ("png" if "png" in args.way else "raw")
        shuffle_rows = 2 * args.rows if args.way.startswith("memory") else args.shuffle_rows
        return feed.feed(rows, shuffle_rows)
    if args.way == "worker":
        loop = partial(_measure_in_pytorch, "train", "memory", args.data, args.seconds, args.command_time)
        return ray_jobs.train_in_worker(loop)
    if not args.way.startswith("ray"):
        return _measure_in_pytorch(args.what, args.way, args.data, args.seconds, args.command_time)
    if args.what == "train":
        return ray_jobs.train(args.data, args.epochs)
    precision = "int8" if args.way == "ray-int8" else None
    return ray_jobs.score(args.data, args.rows, precision, _read_rows(args.data))


def _measure_in_pytorch(what: str, way: str, data: str, seconds: float, command_time: float) -> Measurement:
    images, digits = _read_rows(data)
    if len(images) < memory.BATCH:
        raise RequestError(f"--data {data}: has {len(images)} rows, fewer than a batch of {memory.BATCH}")
    device = _device()
    if way == "loader":
        loop = original.train if what == "train" else original.score
        return asdict(loop(images, digits, seconds, device, command_time))
    if what == "train":
        return asdict(memory.train(images, digits, seconds, device, command_time))
    if way == "memory-int8":
        return asdict(memory.score(images, seconds, torch.device("cpu"), "int8", command_time))
    return asdict(memory.score(images, seconds, device, None, command_time))


def _write_feed(args: argparse.Namespace, folder: Path) -> None:
    images, digits = _read_rows(args.data)
    for name in ("raw", "png"):
        feed.write_rows(folder / name, images, digits, args.rows, png=name == "png")


def _read_rows(data: str) -> tuple[Pixels, list[int]]:
    """Images uint8[n, 28, 28] and digits of the first rows of a source."""
    source = open_source(data)
    images, digits = source.data.fetch(np.arange(min(source.rows, 16_384)))
    return images, digits.tolist()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _summary(what: str, runs: dict[str, list[Measurement]]) -> dict[str, Any]:
    """The fields of the job's last line."""
    medians = {way: _reduce(results, statistics.median) for way, results in runs.items()}
    ratios = {
        f"{way} / {other}": round(medians[way]["rows_per_second"] / medians[other]["rows_per_second"], 3)
        for way, other in RATIOS[what]
        if way in runs
    }
    return {
        "what": what,
        "median": {way: {key: round(value, 3) for key, value in median.items()} for way, median in medians.items()},
        "ratios": ratios,
        "runs": {way: [round(result["rows_per_second"], 1) for result in results] for way, results in runs.items()},
        "hardware": hardware(_device()),
        "versions": versions(),
    }


def _reduce(results: list[Measurement], function: Callable[[list[float]], float]) -> Measurement:
    return {key: function([result[key] for result in results]) for key in results[0]}


def _table(runs: dict[str, list[Measurement]], ratios: dict[str, float]) -> str:
    """A line per way: the median of each figure, with its range in parentheses."""
    lines = []
    for way, results in runs.items():
        median, low, high = (_reduce(results, function) for function in (statistics.median, min, max))
        cells = []
        for key in median:
            digits = 0 if key == "rows_per_second" else 3 if key == "waiting" else 1
            cells.append(f"{key} {median[key]:,.{digits}f} ({low[key]:,.{digits}f}-{high[key]:,.{digits}f})")
        lines.append(f"{way:<12} {'   '.join(cells)}")
    return "\n".join(lines + [f"{name}: {ratio:.3f}" for name, ratio in ratios.items()])
