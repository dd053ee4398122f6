"""Measure the speed of training or scoring beside plain PyTorch and Ray's guides, or the time to the original's accuracy.

Each way is measured in its own process, several times, in turn. mnistsum_ray/benchmark/README.md explains ways and figures.
The last line on standard output is one JSON object.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mnistsum_ray import cli
from mnistsum_ray.arguments import Parser
from mnistsum_ray.benchmark import plain
from mnistsum_ray.cluster.resources import workers_per_gpu
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_array, pixels_view
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.parquet import read_table, to_parquet
from mnistsum_ray.data.sources import Digits, open_source
from mnistsum_ray.errors import RequestError, RunError, UnusableFileError
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.network import make_network
from mnistsum_ray.model.serialization import copy_weights, describe_model, save_model
from mnistsum_ray.reporting.report import versions
from mnistsum_ray.storage.folder import empty_output
from mnistsum_ray.storage.paths import locate

_WAYS: Final = {"train": ["loader", "memory", "guide", "ray"], "score": ["files", "guide", "ray"], "accuracy": ["loader", "ray"]}
_GUIDES: Final = "mnistsum_ray.benchmark.guides"
_EPOCHS: Final = 20 if torch.cuda.is_available() else 2


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; RequestError where a flag is invalid."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=_WAYS)
    parser.add_argument("--data", default="auto", help="as for mnistsum train (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each way; accuracy: seeds (default: 3)")
    parser.add_argument("--seconds", type=float, default=15, help="length of a measurement without Ray (default: 15)")
    parser.add_argument("--rows", type=int, default=400_000, help="score: rows (default: 400000)")
    parser.add_argument("--kill", action="store_true", help="score: kill guide and ray, and count rows after their rerun")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on a terminal too")
    parser.add_argument("--way", help="measure this way alone, once")
    parser.add_argument("--seed", type=int, default=0, help="accuracy: seed of that measurement")
    args = parser.parse_args(argv, argparse.Namespace(started=time.time()))
    if args.way and args.way not in _WAYS[args.what]:
        raise RequestError(f"--way {args.way}: must be one of {', '.join(_WAYS[args.what])}")
    if min(args.repeat, args.rows) < 1 or args.seconds <= 0:
        raise RequestError("--repeat, --seconds, --rows: must be positive")
    return args


def benchmark(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the benchmark, or with `--way` one measurement; return the fields of the last line, and the exit code."""
    args = parse(argv)
    cli.reserve_stdout_for_result()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one card
    if args.way:
        return measure(args), cli.DONE
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS[args.what]}
    figure, name, average = "rows_per_second", "median", statistics.median
    # Alternating, so that a drift of the machine's speed hits all ways alike.
    order = [way for turn in range(args.repeat) for way in _WAYS[args.what][:: -1 if turn % 2 else 1]]
    if args.what == "accuracy":  # the original's take ten minutes each
        figure, name, average = "seconds", "mean", statistics.mean
        order = ["loader", *["ray"] * args.repeat, "loader"]
    for way in order:
        runs[way].append(run_job(*argv, "--way", way, "--seed", len(runs[way]), module="mnistsum_ray.benchmark.suite"))
        print(f"{way}: {json.dumps(runs[way][-1])}", file=sys.stderr, flush=True)
    averages = {way: {key: average([run[key] for run in of_way]) for key in of_way[0]} for way, of_way in runs.items()}
    ratios = {f"ray / {way}": round(averages["ray"][figure] / averages[way][figure], 3) for way in runs}
    line = {"what": args.what, "hardware": hardware(plain.DEVICE), name: averages, "ratios": ratios, "runs": runs}
    return line | {"versions": versions()}, cli.DONE


def run_job(*arguments: object, module: str = "mnistsum_ray") -> dict[str, Any]:
    """Run `mnistsum`, or another module, as a user does, and return the JSON object that it prints last; RunError if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command[2:])} failed; see its error above")
    result: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return result  # Ray Data writes other lines, too


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Measure `args.way` of `args.what`."""
    source = open_source(args.data)
    images, digits = source.data.fetch(np.arange(min(source.rows, 16_384)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        match args.what, args.way:
            case "train", "loader":
                batches = (batch for _ in itertools.count() for batch in plain.original_batches(images, digits))
                return _time_steps(itertools.starmap(plain.OriginalStep(), batches), args)
            case "train", "memory":
                rows = torch.tensor(images).to(plain.DEVICE), torch.tensor(digits, device=plain.DEVICE).long()
                again = itertools.cycle(zip(*(torch.split(values, plain.BATCH) for values in rows), strict=True))
                return _time_steps(itertools.starmap(plain.TrainingStep(), again), args)
            case "train", "guide":
                write_rows(folder / "in", images, digits, len(images))
                started = time.time()
                line = run_job("train", folder / "in", folder / "runs", _EPOCHS, module=_GUIDES)
                return {"rows_per_second": line["rows_per_second"], "first_row_seconds": line["first_row"] - started}
            case "train", _:
                return _train(args, folder)
            case "score", _:
                write_rows(folder / "in", images, digits, args.rows)
                weights = copy_weights(make_network())  # random ones, on which the speed does not depend
                save_model(empty_output(f"{folder}/model"), weights, describe_model(weights, epoch=0, metrics={}))
                return _score_files(args, folder) if args.way == "files" else _score(args, folder)
            case _, "loader":
                accuracies, started = plain.original_accuracy(source), args.started
            case _:
                started = time.time()
                flags = ["--data", args.data, "--recipe", "quick", "--seed", args.seed, "--storage-path", folder]
                accuracies = run_job("train", *flags)["test"]
        return {key: accuracies[key] for key in ("digit_accuracy", "sum_accuracy")} | {"seconds": time.time() - started}


def _time_steps(steps: Iterator[int], args: argparse.Namespace) -> dict[str, float]:
    """Take three steps, and then measure for `args.seconds`. `steps` gives the rows of each step, when it is done."""

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


def _train(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Speed of `mnistsum train` with one worker; the first epoch does not count towards the rate and the waiting."""
    flags = ["--data", args.data, "--epochs", _EPOCHS, "--batch-size", plain.BATCH, "--num-workers", 1, "--sum-head-steps", 0]
    started = time.time()
    run_job("train", *flags, "--storage-path", folder, "--name", "run")
    first, *others = (json.loads(entry) for entry in (folder / "run" / "history.jsonl").open())
    means = {name: float(np.mean([entry[name] for entry in others])) for name in ("rows_per_second", "waiting")}
    return means | {"first_row_seconds": first["started"] + first["first_batch_seconds"] - started}


def write_rows(folder: Path, images: Pixels, digits: Digits, rows: int) -> None:
    """Write so many rows as Parquet, the images again and again: `id` (each is another), `image`, `number` and `digit`."""
    folder.mkdir()
    for index, ids in enumerate(np.array_split(np.arange(rows), 8)):
        places = ids % len(images)
        columns = {"id": ids, "image": pixels_array(images[places]), "number": (ids % NUMBERS).astype(np.int8)}
        pq.write_table(pa.table(columns | {"digit": digits[places]}), folder / f"part-{index}.parquet", row_group_size=8192)


def _score_files(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The rates of as many processes as the job has, added, without Ray."""
    count = os.cpu_count() or 1
    if torch.cuda.is_available():
        count = workers_per_gpu(torch.cuda.get_device_properties(0).total_memory, count)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(score_files, itertools.repeat(args), itertools.repeat(folder), range(count)))
    first = min(figures["first_row_seconds"] for figures in measured)
    return {"rows_per_second": sum(figures["rows_per_second"] for figures in measured), "first_row_seconds": first}


def score_files(args: argparse.Namespace, folder: Path, index: int) -> dict[str, float]:
    """Read files of pairs, predict and write predictions, as a process that scores; a step is a file."""
    # A forward pass alone says little about such a job: on a card it takes less time than the files.
    predictor, output = plain.load_predictor(folder / "model"), empty_output(f"{folder}/out-{index}")

    def steps() -> Iterator[int]:
        for file in itertools.cycle(sorted((folder / "in").iterdir())):
            table = read_table(locate(str(file), "--input"))
            numbers = table["number"].to_numpy().astype(np.int64)
            added = predictor.predict(pixels_view(one_chunk(table["image"])), numbers).to_arrow(numbers)
            output.write(file.name, to_parquet(pa.table({name: table[name] for name in ("id", "number", "digit")} | added)))
            yield len(numbers)

    return _time_steps(steps(), args)


def _score(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run the command of `mnistsum score`, or of the guide; with `--kill` it is begun and killed before."""
    output = folder / "out"
    module, command = "mnistsum_ray", ["score", "--input", folder / "in", "--output", output, "--model", folder / "model"]
    if args.way == "guide":
        module, command = _GUIDES, ["score", folder / "in", output, folder / "model"]

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


if __name__ == "__main__":
    sys.exit(cli.run(benchmark, sys.argv[1:]))
