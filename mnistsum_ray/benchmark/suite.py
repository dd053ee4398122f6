"""Measure the speed of training or scoring beside plain PyTorch, or the time to the original's
accuracy.

    python jobs/benchmark.py train --data FOLDER
    python jobs/benchmark.py score --data FOLDER
    python jobs/benchmark.py accuracy --data FOLDER --repeat 5

Each way is measured in its own process, several times, in alternating order:

    loader    the original's way: row by row through a DataLoader, float32
    memory    (train) the job's step on tensors in memory
    files     (score) as many bare processes, which read and write Parquet (files-int8: 8-bit integers)
    worker    (train) the loop of memory in a Ray Train worker
    ray       mnistsum train, or mnistsum score (ray-int8: --precision int8)

mnistsum_ray/benchmark/README.md explains the figures. The last line on standard output is one JSON
object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mnistsum_ray import cli
from mnistsum_ray.benchmark.process import Measurement, run_job
from mnistsum_ray.errors import RequestError

WAYS: Final = {
    "train": ("loader", "memory", "worker", "ray"),
    "score": ("loader", "files", "files-int8", "ray", "ray-int8"),
}

ORIGINAL_ACCURACY: Final = {"digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
"""On the test rows, as the original reports it."""

# This module, which runs the measurements, imports neither torch nor Ray: `--help` comes at once.


def main() -> int:
    """Run the benchmark with the command line of this process; return its exit code."""
    return cli.run(_job, sys.argv[1:])


def _job(argv: list[str]) -> tuple[dict[str, Any], int]:
    args = parse(argv)
    cli.reserve_stdout_for_result()
    return benchmark(args, argv), cli.DONE


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        RequestError: a flag is invalid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*WAYS, "accuracy"))
    parser.add_argument("--data", default="auto", help="as for mnistsum train (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each way; accuracy: seeds (default: 3)")
    parser.add_argument("--seconds", type=float, default=15, help="length of a measurement without Ray's jobs (default: 15)")
    epochs = "train: epochs of mnistsum train, the first of which does not count (default: 2; 20 on a GPU)"
    parser.add_argument("--epochs", type=int, help=epochs)
    parser.add_argument("--rows", type=int, default=400_000, help="score: rows (default: 400000)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on a terminal too")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--command-time", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.epochs is not None and args.epochs < 2:
        raise RequestError("--epochs: must be at least 2, since the first does not count")
    if min(args.repeat, args.rows) < 1 or args.seconds <= 0:
        raise RequestError("--repeat, --seconds, --rows: must be positive")
    if args.data not in ("auto", "sample", "mnist") and "://" not in args.data and not args.data.startswith("~"):
        args.data = str(Path(args.data).absolute())  # Ray's workers have another working directory
    return args


def benchmark(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Run the benchmark, or with `--way` one measurement; `argv` is for the processes that measure.

    Returns:
        The fields of the job's last line.

    Raises:
        RequestError: the data have too few rows.
        RunError: a measurement failed.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one card
    import torch

    from mnistsum_ray.benchmark import ways
    from mnistsum_ray.cluster.resources import workers_per_gpu
    from mnistsum_ray.model import int8
    from mnistsum_ray.model.device import hardware
    from mnistsum_ray.reporting.report import versions

    if args.way:
        return ways.measure(args)
    machine = hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what == "accuracy":
        line = _accuracy(args, argv)
    else:
        processes = dict.fromkeys(WAYS[args.what], 1)
        if args.what == "score":  # as many processes as in mnistsum score; int8 runs on CPUs
            processes |= dict.fromkeys(["files", "files-int8"], machine["cores"])
            if machine["gpu"]:
                processes["files"] = workers_per_gpu(torch.cuda.get_device_properties(0).total_memory, machine["cores"])
            if reason := int8.unavailable_reason():
                _say(f"int8 is left out: {reason}")
                del processes["files-int8"], processes["ray-int8"]
        line = _speed(args, argv, processes)
    return line | {"what": args.what, "hardware": machine, "versions": versions()}


def _run_way(argv: list[str], way: str, processes: int = 1) -> Measurement:
    """Measure a way once. The rates of processes that share the cores are added."""
    flags = ["--way", way, "--command-time", time.time()]
    lines = run_job(*argv, *flags, module="mnistsum_ray.benchmark.suite", processes=processes)
    figures = _combine([{key: value for key, value in line.items() if key != "printed"} for line in lines], max)
    if processes > 1:
        figures["rows_per_second"] = sum(line["rows_per_second"] for line in lines)
    return {key: round(value, 6) for key, value in figures.items()}


def _speed(args: argparse.Namespace, argv: list[str], processes: dict[str, int]) -> dict[str, Any]:
    """Measure each way several times, in this number of processes; medians, ratios of medians, and all rates."""
    runs: dict[str, list[Measurement]] = {way: [] for way in processes}
    for turn in range(args.repeat):
        # Every other turn goes backwards, so that a drift of the machine's speed hits all ways alike.
        for way in list(runs)[:: -1 if turn % 2 else 1]:
            runs[way].append(_run_way(argv, way, processes[way]))
            _say_figures(way, runs[way][-1])
    medians = {way: _combine(results, statistics.median) for way, results in runs.items()}
    for way, figures in medians.items():
        _say_figures(f"{way}, median", figures)
    rates = {way: figures["rows_per_second"] for way, figures in medians.items()}
    ratios = {}
    for way in rates:
        for other in ("loader", "worker", way.replace("ray", "memory"), way.replace("ray", "files")):
            if way.startswith("ray") and other in rates:
                ratios[f"{way} / {other}"] = round(rates[way] / rates[other], 3)
                _say(f"{way} / {other}: {ratios[f'{way} / {other}']:.3f}")
    all_rates = {way: [result["rows_per_second"] for result in results] for way, results in runs.items()}
    return {"median": medians, "ratios": ratios, "runs": all_rates}


def _accuracy(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measure the original, and `mnistsum train --recipe quick` with each seed, the whole command, and the original again.

    The original takes ten minutes, in which the speed of a machine drifts.

    Returns:
        Accuracies on the test rows and seconds from the command, of the original in the mean, and of `ray` over the seeds;
        `reached`, whether that mean reaches the original's accuracies; and the quotient of the seconds.
    """
    theirs, ours = [_run_way(argv, "loader")], []
    _say_figures("loader, before", theirs[0])
    for seed in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            command_time = time.time()
            flags = ["--data", args.data, "--recipe", "quick", "--seed", seed, "--storage-path", folder, "--name", "accuracy"]
            (line,) = run_job("train", *flags)
            seconds = line["printed"] - command_time
        ours.append({key: line["test"][key] for key in ORIGINAL_ACCURACY} | {"seconds": seconds})
        _say_figures(f"ray, seed {seed}", ours[-1])
    theirs.append(_run_way(argv, "loader"))
    _say_figures("loader, after", theirs[1])
    loader, mean = (_combine(results, statistics.mean) for results in (theirs, ours))
    _say_figures("ray, mean", mean)
    return {
        "loader": loader,
        "ray": mean,
        "seeds": ours,
        "reached": all(mean[key] >= accuracy for key, accuracy in ORIGINAL_ACCURACY.items()),
        "times_faster": round(loader["seconds"] / mean["seconds"], 2),
    }


def _combine(results: list[Measurement], how: Callable[[list[float]], float]) -> Measurement:
    return {key: how([result[key] for result in results]) for key in results[0]}


def _say_figures(name: str, figures: Measurement) -> None:
    texts = (f"{key} {value:,.0f}" if value >= 100 else f"{key} {value:.5g}" for key, value in figures.items())
    _say(f"{name}: {', '.join(texts)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
