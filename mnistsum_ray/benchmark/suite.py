"""Measure the speed of training or scoring beside plain PyTorch, or the time to the original's
accuracy.

    mnistsum benchmark train --data FOLDER
    mnistsum benchmark score --data FOLDER
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

`accuracy` measures the time from the command to a model that is as accurate as the original after
its five epochs, with the recipe `quick` and `--repeat` seeds, beside the original's way.

The table on standard error holds medians, with minimum and maximum in parentheses;
mnistsum_ray/benchmark/README.md explains the figures. The last line on standard output is one JSON
object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.errors import RequestError, RunError

WAYS: Final = {
    "train": ("loader", "memory", "worker", "ray"),
    "score": ("loader", "memory", "memory-int8", "ray", "ray-int8"),
    "accuracy": ("loader",),
}
RATIOS: Final = {
    "train": (("ray", "memory"), ("ray", "worker"), ("ray", "loader")),
    "score": (("ray", "memory"), ("ray", "loader"), ("ray-int8", "memory-int8"), ("ray-int8", "loader")),
}

ORIGINAL_ACCURACY: Final = {"digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
"""On the test rows, as the original reports it."""

Measurement = dict[str, float]

# This module, which runs the measurements, imports neither torch nor Ray: `--help` comes at once.


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
    epochs = "train: epochs of mnistsum train, the first of which does not count (default: 2; 20 on a GPU)"
    parser.add_argument("--epochs", type=int, help=epochs)
    parser.add_argument("--rows", type=int, default=400_000, help="score: rows (default: 400000)")
    parser.add_argument("--way", choices=sorted({way for ways in WAYS.values() for way in ways}), help=argparse.SUPPRESS)
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
    import torch

    from mnistsum_ray.model import int8
    from mnistsum_ray.model.device import hardware
    from mnistsum_ray.reporting.report import versions

    if args.way:
        from mnistsum_ray.benchmark import ways

        return ways.measure(args)
    measured = [way for way in WAYS[args.what] if not way.endswith("int8") or not int8.unavailable_reason()]
    if args.what == "accuracy":
        line = _accuracy(args, argv)
    else:
        if args.what == "score" and len(measured) < len(WAYS["score"]):
            _say("int8 is left out: this PyTorch has no integer convolutions on this CPU")
        line = _speed(args, argv, measured)
    machine = hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return line | {"hardware": machine, "versions": versions()}


def run_job(command: str, *flags: object, name: str | None = None) -> tuple[dict[str, Any], float]:
    """Run `mnistsum COMMAND` as a user does.

    Returns:
        Its last line, and the seconds from the command to that line, after which Ray's processes end.

    Raises:
        RunError: it failed; names it `name`.
    """
    started, seconds, last = time.perf_counter(), 0.0, ""
    arguments = [sys.executable, "-m", "mnistsum_ray", command, *map(str, flags)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        try:
            for printed in job.stdout:
                last, seconds = printed, time.perf_counter() - started
        except BaseException:
            job.kill()
            raise
    if job.returncode:
        raise RunError(f"{name or command} could not be measured; see its error above")
    return json.loads(last), seconds


def _run_way(argv: list[str], way: str) -> Measurement:
    line, _ = run_job("benchmark", *argv, "--way", way, "--command-time", time.time(), name=way)
    return line


def _speed(args: argparse.Namespace, argv: list[str], ways: list[str]) -> dict[str, Any]:
    """Measure each way several times; medians, ratios of medians, and all rates."""
    runs: dict[str, list[Measurement]] = {way: [] for way in ways}
    for turn in range(args.repeat):
        # Every other turn goes backwards, so that a drift of the machine's speed hits all ways alike.
        for way in ways[:: -1 if turn % 2 else 1]:
            runs[way].append(_run_way(argv, way))
            _say(f"{way}: {runs[way][-1]['rows_per_second']:,.0f} rows/s")
    medians: dict[str, Measurement] = {}
    for way, results in runs.items():
        figures = {key: [result[key] for result in results] for key in results[0]}
        medians[way] = {key: statistics.median(values) for key, values in figures.items()}
        cells = [f"{key} {_range(medians[way][key], values, key)}" for key, values in figures.items()]
        _say(f"{way:<12} {'   '.join(cells)}")
    ratios = {
        f"{way} / {other}": round(medians[way]["rows_per_second"] / medians[other]["rows_per_second"], 3)
        for way, other in RATIOS[args.what]
        if way in runs
    }
    for name, ratio in ratios.items():
        _say(f"{name}: {ratio:.3f}")
    return {
        "what": args.what,
        "median": {way: {key: round(value, 3) for key, value in median.items()} for way, median in medians.items()},
        "ratios": ratios,
        "runs": {way: [round(result["rows_per_second"], 1) for result in results] for way, results in runs.items()},
    }


def _range(median: float, values: list[float], key: str) -> str:
    digits = {"rows_per_second": 0, "waiting": 3}.get(key, 1)
    return f"{median:,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def _accuracy(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measure the original once, and `mnistsum train --recipe quick` with each seed, to the line that says that it is published.

    Returns:
        Accuracies on the test rows and seconds from the command, of the original, and of `ray` in the mean over the seeds;
        `reached`, whether that mean reaches the original's accuracies; and the quotient of the seconds.
    """

    def said(name: str, result: Measurement) -> Measurement:
        accuracies = f"digit {result['digit_accuracy']:.2%}, sum {result['sum_accuracy']:.3%}"
        _say(f"{name}: {accuracies}, {result['seconds']:.0f} s")
        return result

    theirs, ours = said("loader", _run_way(argv, "loader")), []
    for seed in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--data", args.data, "--recipe", "quick", "--seed", seed, "--storage-path", folder, "--name", "accuracy"]
            line, seconds = run_job("train", *flags)
        accuracies = {key: line["test"][key] for key in ORIGINAL_ACCURACY}
        ours.append(said(f"ray, seed {seed}", accuracies | {"seconds": seconds}))
    mean = said("ray, mean", {key: statistics.mean(result[key] for result in ours) for key in ours[0]})
    return {
        "what": "accuracy",
        "loader": theirs,
        "ray": mean,
        "seeds": ours,
        "reached": all(mean[key] >= accuracy for key, accuracy in ORIGINAL_ACCURACY.items()),
        "times_faster": round(theirs["seconds"] / mean["seconds"], 2),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
