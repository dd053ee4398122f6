"""Measure the speed of training or scoring beside plain PyTorch and Ray's guides, or the time to the
original's accuracy.

Each way is measured in its own process, several times, in alternating order:

    loader    (train, accuracy) the original's way: row by row through a DataLoader, float32
    memory    (train) the job's step on tensors in memory
    files     (score) as many bare processes, which read and write Parquet
    guide     what Ray's guides show, with our network
    ray       mnistsum train, or mnistsum score

mnistsum_ray/benchmark/README.md explains the figures. The last line on standard output is one JSON
object. Exit codes: 0 done, 2 the request is invalid, 1 anything else.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, Final

from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError

WAYS: Final = {
    "train": ["loader", "memory", "guide", "ray"],
    "score": ["files", "guide", "ray"],
    "accuracy": ["loader", "ray"],
}

ORIGINAL_ACCURACY: Final = {"digit_accuracy": 0.9946, "sum_accuracy": 0.9927}
"""The original's published accuracies on the test rows."""

# This module, which runs the measurements, imports neither torch nor Ray: `--help` comes at once.


def main() -> int:
    """Run the benchmark with the command line of this process; return its exit code."""
    return cli.run(benchmark, sys.argv[1:])


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; RequestError where a flag is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--data", default="auto", help="as for mnistsum train (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each way; accuracy: seeds (default: 3)")
    parser.add_argument("--seconds", type=float, default=15, help="length of a measurement without Ray (default: 15)")
    parser.add_argument("--rows", type=int, default=400_000, help="score: rows (default: 400000)")
    parser.add_argument("--kill", action="store_true", help="score: kill guide and ray, and count rows after their rerun")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on a terminal too")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv, argparse.Namespace(started=time.time()))
    if min(args.repeat, args.rows) < 1 or args.seconds <= 0:
        raise RequestError("--repeat, --seconds, --rows: must be positive")
    return args


def benchmark(argv: list[str]) -> tuple[dict[str, Any], int]:
    """Run the benchmark, or with `--way` one measurement; return the fields of the last line, and the exit code.

    `train` and `score` give medians, their ratios, and all rates; `accuracy` means, figures by seed, whether the mean `reached`
    the original's accuracies, and the quotient of the seconds.
    """
    args = parse(argv)
    cli.reserve_stdout_for_result()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # every way has one card
    import torch

    from mnistsum_ray.benchmark import ways
    from mnistsum_ray.model.device import hardware
    from mnistsum_ray.reporting.report import versions

    if args.way:
        return ways.measure(args), cli.DONE
    line = {"what": args.what, "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    runs: dict[str, list[ways.Measurement]] = {way: [] for way in WAYS[args.what]}
    # Alternating, so that a drift of the machine's speed hits all ways alike. Of accuracies the original's take ten minutes each.
    order = [way for turn in range(args.repeat) for way in WAYS[args.what][:: -1 if turn % 2 else 1]]
    for way in order if args.what != "accuracy" else ["loader", *["ray"] * args.repeat, "loader"]:
        figures = ways.run_job(*argv, "--way", way, "--seed", len(runs[way]), module="mnistsum_ray.benchmark.suite")
        runs[way].append({key: round(value, 6) for key, value in figures.items()})
        print(f"{way}: {json.dumps(runs[way][-1])}", file=sys.stderr, flush=True)
    average = statistics.mean if args.what == "accuracy" else statistics.median
    means = {way: {key: average(run[key] for run in of_way) for key in of_way[0]} for way, of_way in runs.items()}
    ours = means["ray"]
    if args.what == "accuracy":
        reached = all(ours[key] >= accuracy for key, accuracy in ORIGINAL_ACCURACY.items())
        faster = round(means["loader"]["seconds"] / ours["seconds"], 2)
        line |= means | {"seeds": runs["ray"], "reached": reached, "times_faster": faster}
    else:
        rates = {way: [run["rows_per_second"] for run in of_way] for way, of_way in runs.items()}
        ratios = {f"ray / {way}": round(ours["rows_per_second"] / means[way]["rows_per_second"], 3) for way in means}
        line |= {"median": means, "ratios": ratios, "runs": rates}
    return line | {"versions": versions()}, cli.DONE


if __name__ == "__main__":
    sys.exit(main())
