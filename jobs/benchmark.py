"""Our speed beside plain PyTorch, in one run on one machine.

    python jobs/benchmark.py train --data FOLDER
    python jobs/benchmark.py score --data FOLDER

Several ways, each in a process of its own, in this order and then backwards and so on, since a machine's speed drifts:

    loader       the original's way: torchvision's dataset row by row through a DataLoader, float32, PyTorch's default layout
    memory       our model on tensors that already lie in memory, nothing else running; for training with the same threads and
                 optimizer, for scoring with the best batch and the best number of processes
    memory-int8  (score) the same with --precision int8
    worker       (train) memory's loop, but in a Ray Train worker: what is left between it and ray is the data's doing
    ray          jobs/train.py as it is, or jobs/score.py as it is
    ray-int8     (score) the same with --precision int8

Of each: rows a second in steady state; seconds from the command until the first batch is asked for, and from there until it is
trained on or scored (of `ray`, until it is there); for scoring with Ray seconds from the command to the first committed file, of
1,000 rows. Steady state leaves out three batches, `ray`'s first epoch, or all that comes before the first row is read. Medians,
the extremes in brackets, as a table on standard error; the last line on standard output is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mnistsum_ray import cli
from mnistsum_ray.benchmark import loops
from mnistsum_ray.benchmark.loops import BATCH, Speed
from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import ExportPairsConfig, TrainConfig
from mnistsum_ray.data.decoding import Pixels, one_chunk, pixels_view
from mnistsum_ray.data.parquet_parts import read_whole
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import quantization
from mnistsum_ray.model.device import hardware
from mnistsum_ray.model.evaluation import Metrics
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.serialization import copy_weights, save_model
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.versions import versions
from mnistsum_ray.storage.location import locate

WAYS = {
    "train": ("loader", "memory", "worker", "ray"),
    "score": ("loader", "memory", "memory-int8", "ray", "ray-int8"),
}
RATIOS = {
    "train": (("ray", "memory"), ("ray", "worker"), ("ray", "loader")),
    "score": (("ray", "memory"), ("ray", "loader"), ("ray-int8", "memory-int8"), ("ray-int8", "loader")),
}
JOBS = Path(__file__).parent


def train_with_ray(data: str, epochs: int) -> dict[str, float]:
    """jobs/train.py: its speed, and of all epochs but the first the share of the time spent waiting, and the longest gap."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", data, "--epochs", epochs, "--batch-size", BATCH, "--storage-path", folder, "--name", "benchmark"]
        began = time.time()
        _command("train.py", *flags, "--num-workers", 1)  # as the others have it
        lines = (Path(folder) / "benchmark" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    first, later = history[0], history[1:]
    seconds = sum(entry["seconds"] for entry in later)
    rows = sum(entry["rows_per_second"] * entry["seconds"] for entry in later)
    gaps = [
        after["started"] - (entry["started"] + entry["seconds"] + entry["evaluation_seconds"])
        for entry, after in pairwise(history)
    ]
    return {
        "rows_per_second": rows / seconds,
        "startup_seconds": first["started"] - began,
        "first_batch_seconds": first["first_batch_seconds"],
        "waiting": sum(entry["waiting"] * entry["seconds"] for entry in later) / seconds,
        "between_epochs_seconds": max(gaps),
    }


def score_with_ray(data: str, rows: int, precision: list[str]) -> dict[str, float]:
    """jobs/score.py: its speed on so many rows; from the command to the first committed file with 1,000."""
    one_gpu = ["--num-workers", "1"] if torch.cuda.is_available() and not precision else []  # as the others have it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _random_model(folder / "model", data)

        def scored(count: int, files: int) -> tuple[float, float]:
            """Rows a second, and seconds from the command to the first committed file."""
            pairs, output = folder / f"pairs-{count}", folder / f"predictions-{count}"
            export_pairs(ExportPairsConfig(data=data, output=str(pairs), rows=count, files=files), Console().say)
            began = time.time()
            line = _command("score.py", "--model", folder / "model", "--input", pairs, "--output", output, *precision, *one_gpu)
            assert line["scored_rows"] == count
            # A file's time is that of its last byte; it takes its final name right after.
            first = min(file.stat().st_mtime for file in output.glob("*.parquet") if file.name[0] != "_")
            return line["rows_per_second"], first - began

        rate, _ = scored(rows, min(8, rows))
        return {"rows_per_second": rate, "first_file_seconds": scored(1000, 1)[1]}


def _random_model(folder: Path, data: str) -> None:
    """A model folder with random weights, which are as fast as any, calibrated for int8."""
    folder.mkdir()
    model = TwoHeadCNN().eval()
    nothing = Metrics(rows=0, pairs=0, loss=0.0, digit_accuracy=0.0, sum_accuracy=0.0)
    save_model(folder, copy_weights(model), epoch=0, validation=nothing, test=nothing)
    if not quantization.is_available():
        return
    images, digits = (torch.as_tensor(values[:500]) for values in _rows(data))
    card = folder / "model.json"
    card.write_text(
        json.dumps(json.loads(card.read_text()) | {"int8": quantization.quantize(model, images, images, digits).as_json()})
    )


def _command(script: str, *flags: object, name: str | None = None) -> dict[str, Any]:
    """Run one of the jobs; its last line. An error calls it by `name`."""
    command = [sys.executable, str(JOBS / script), *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RunError(f"{name or script} could not be measured; its error stands above")
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def train_in_worker(data: str, seconds: float, began: float) -> dict[str, float]:
    """`loops.memory_loop` in a Ray Train worker with the resources that jobs/train.py gives it."""
    import ray

    from mnistsum_ray.cluster.resources import inspect_cluster
    from mnistsum_ray.training.resources import plan_resources
    from mnistsum_ray.training.worker import set_cpu_threads  # imports Ray, for which the other ways should not wait

    def loop(_: dict[str, Any]) -> dict[str, float]:
        set_cpu_threads(1)
        return asdict(in_pytorch("train", "memory", data, seconds, began))

    connect()
    allotment = plan_resources(TrainConfig(num_workers=1), inspect_cluster())
    with tempfile.TemporaryDirectory() as folder:
        trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=allotment.use_gpu, resources_per_worker=allotment.per_worker
            ),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        measured: dict[str, float] = trainer.fit().return_value
        return measured


def in_pytorch(what: str, way: str, data: str, seconds: float, began: float) -> Speed:
    """One of the ways that are not Ray's."""
    device = _device()
    images, digits = _rows(data)
    if len(images) < BATCH:
        raise RequestError(f"--data {data}: has {len(images)} rows, and a batch takes {BATCH}")
    if way == "loader":
        loop = loops.loader_loop if what == "train" else loops.score_loader_loop
        return loop(images, digits, seconds, device, began)
    if what == "train":
        return loops.memory_loop(images, digits, seconds, device, began)
    if way == "memory-int8":
        return loops.score_memory_loop(images, seconds, torch.device("cpu"), "int8", began)
    return loops.score_memory_loop(images, seconds, device, None, began)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rows(data: str) -> tuple[Pixels, list[int]]:
    tables = [read_whole(part) for part in open_source(data).parts[:2]]
    images = torch.cat([torch.tensor(pixels_view(one_chunk(table["image"]))) for table in tables]).numpy()
    return images, [digit for table in tables for digit in table["digit"].to_pylist()]


def one(args: argparse.Namespace) -> dict[str, float]:
    """Measure one way in this process."""
    if args.way == "worker":
        return train_in_worker(args.data, args.seconds, args.began)
    if not args.way.startswith("ray"):
        return asdict(in_pytorch(args.what, args.way, args.data, args.seconds, args.began))
    if args.what == "train":
        return train_with_ray(args.data, args.epochs)
    return score_with_ray(args.data, args.rows, ["--precision", "int8"] if args.way == "ray-int8" else [])


def benchmark(argv: list[str]) -> tuple[dict[str, Any], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--data", default="auto", help="as for jobs/train.py (default: auto)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each way is measured (default: 3)")
    parser.add_argument("--seconds", type=float, default=15, help="length of each loop that is not Ray's (default: 15)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=20 if torch.cuda.is_available() else 2,
        help="train: epochs of each Ray run, the first uncounted (default: 2; 20 on a GPU)",
    )
    parser.add_argument("--rows", type=int, default=400_000, help="score: rows of each Ray run (default: 400000)")
    parser.add_argument("--way", choices=sorted({way for ways in WAYS.values() for way in ways}), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cli.leave_stdout_to_result()
    if args.epochs < 2:
        raise RequestError("--epochs: must be at least 2, the first is not counted")
    if args.repeat < 1 or args.seconds <= 0 or args.rows < 1:
        raise RequestError("--repeat, --seconds, --rows: must be positive")
    if args.data not in ("auto", "sample", "mnist") and "://" not in args.data:
        args.data = locate(args.data, "--data").display  # Ray's workers have another working folder
    if args.way:
        return one(args), cli.DONE

    ways = WAYS[args.what]
    if args.what == "score" and not quantization.is_available():
        print("int8 is left out: this PyTorch has no integer convolutions on this CPU", file=sys.stderr)
        ways = tuple(way for way in ways if not way.endswith("int8"))
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(args.repeat):
        for way in ways if turn % 2 == 0 else reversed(ways):
            result = _command("benchmark.py", *argv, "--way", way, "--began", time.time(), name=way)
            runs[way].append(result)
            print(f"{way}: {result['rows_per_second']:,.0f} rows/s", file=sys.stderr, flush=True)
    keys = {way: list(of_way[0]) for way, of_way in runs.items()}
    middle = {
        way: {key: statistics.median(result[key] for result in of_way) for key in keys[way]} for way, of_way in runs.items()
    }
    ratios = {
        f"{way} / {other}": round(middle[way]["rows_per_second"] / middle[other]["rows_per_second"], 3)
        for way, other in RATIOS[args.what]
        if way in runs
    }
    line = {
        "what": args.what,
        "median": {way: {key: round(value, 3) for key, value in of_way.items()} for way, of_way in middle.items()},
        "ratios": ratios,
        "runs": {way: [round(result["rows_per_second"], 1) for result in of_way] for way, of_way in runs.items()},
        "hardware": hardware(_device()),
        "versions": versions(),
    }
    print(_table(runs, ratios), file=sys.stderr, flush=True)
    return line, cli.DONE


def _table(runs: dict[str, list[dict[str, float]]], ratios: dict[str, float]) -> str:
    lines = []
    for way, of_way in runs.items():
        cells = []
        for key in of_way[0]:
            values = [result[key] for result in of_way]
            digits = 0 if key == "rows_per_second" else 3 if key == "waiting" else 1
            cells.append(f"{key} {statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})")
        lines.append(f"{way:<12} {'   '.join(cells)}")
    return "\n".join(lines + [f"{name}: {ratio:.3f}" for name, ratio in ratios.items()])


def main(argv: list[str]) -> int:
    return cli.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
