"""Our speed beside plain PyTorch, in one run on one machine: rows a second in steady state.

    python jobs/benchmark.py train --data FOLDER
    python jobs/benchmark.py score --data FOLDER

Several ways, each in a process of its own, once in this order and once backwards, since a machine's speed drifts:

    loader    the original's way: torchvision's dataset row by row through a DataLoader, float32, PyTorch's default layout
    memory    our model and precision on float tensors that already lie in memory, nothing else running; for training with the
              same threads and optimizer, for scoring with the best batch and the best number of processes
    worker    (train) the same loop, but in a Ray Train worker: what is left between it and ray is the data's doing
    ray       jobs/train.py as it is, its first epoch left out; or jobs/score.py as it is, from the first row read to the last
              file committed

The last line on standard output is one JSON object.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mnistsum_ray import baseline, job
from mnistsum_ray.baseline import BATCH
from mnistsum_ray.checkpoint import save_model, weights_of
from mnistsum_ray.config import ExportConfig, Refusal, RunFailed, ScoreConfig, TrainConfig
from mnistsum_ray.loop import use_cores
from mnistsum_ray.metrics import Scores
from mnistsum_ray.mnist import ParquetPart, open_source
from mnistsum_ray.model import TwoHeadCNN
from mnistsum_ray.report import Console
from mnistsum_ray.schema import Pixels, pixels_view
from mnistsum_ray.storage import locate

WAYS = {"train": ("loader", "memory", "worker", "ray"), "score": ("loader", "memory", "ray")}


def train_with_ray(data: str, epochs: int) -> dict[str, float]:
    """Rows a second, and the share of the time spent waiting for data, over all epochs but the first."""
    from mnistsum_ray.prepare import prepare
    from mnistsum_ray.train import fit

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(data=data, epochs=epochs, batch_size=BATCH, max_shift=2, storage_path=folder, name="benchmark")
        job.connect()
        with contextlib.redirect_stdout(sys.stderr):
            fit(prepare(config), Console())
        lines = (Path(folder) / "benchmark" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines[1:]]
    seconds = sum(entry["seconds"] for entry in history)
    rows = sum(entry["rows_per_second"] * entry["seconds"] for entry in history)
    waiting = sum(entry["waiting"] * entry["seconds"] for entry in history)
    return {"rows_per_second": rows / seconds, "waiting": waiting / seconds}


def score_with_ray(data: str, rows: int) -> dict[str, float]:
    """Rows a second from the first row read to the last file committed, and the seconds of the whole command."""
    from mnistsum_ray.export import export
    from mnistsum_ray.score.prepare import prepare
    from mnistsum_ray.score.run import score

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(ExportConfig(data=data, output=str(folder / "pairs"), rows=rows, files=8), Console().say)
        (folder / "model").mkdir()
        nothing = Scores(rows=0, pairs=0, loss=0.0, digit_accuracy=0.0, sum_accuracy=0.0)
        save_model(folder / "model", weights_of(TwoHeadCNN()), epoch=0, validation=nothing, test=nothing)
        started = time.monotonic()
        config = ScoreConfig(model=str(folder / "model"), input=(str(folder / "pairs"),), output=str(folder / "predictions"))
        prepared = prepare(config)
        job.connect()
        line, complete = score(prepared, Console())
        assert complete
        assert line["scored_rows"] == rows
        return {"rows_per_second": line["rows_per_second"], "seconds": time.monotonic() - started}


def train_in_worker(data: str, seconds: float) -> dict[str, float]:
    """`baseline.memory_loop` in a Ray Train worker with the resources that jobs/train.py gives it."""
    import ray

    from mnistsum_ray.resources import allot, look

    def loop(_: dict[str, Any]) -> float:
        use_cores(1)
        return in_pytorch("train", "memory", data, seconds)["rows_per_second"]

    job.connect()
    allotment = allot(TrainConfig(num_workers=1), look())
    with tempfile.TemporaryDirectory() as folder:
        trainer = ray.train.torch.TorchTrainer(
            loop,
            train_loop_config={},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=allotment.use_gpu, resources_per_worker=allotment.per_worker
            ),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        return {"rows_per_second": float(trainer.fit().return_value)}


def in_pytorch(what: str, way: str, data: str, seconds: float) -> dict[str, float]:
    """One of the ways that are not Ray's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, digits = _rows(data)
    if way == "loader":
        loop = baseline.loader_loop if what == "train" else baseline.score_loader_loop
        return {"rows_per_second": loop(images, digits, seconds, device)}
    if what == "train":
        return {"rows_per_second": baseline.memory_loop(images, digits, seconds, device)}
    return {"rows_per_second": baseline.score_memory_loop(images, seconds, device)}


def _rows(data: str) -> tuple[Pixels, list[int]]:
    tables = [part.read() if isinstance(part, ParquetPart) else part for part in open_source(data).parts[:2]]
    images = torch.cat([torch.tensor(pixels_view(table["image"].combine_chunks())) for table in tables]).numpy()
    return images, [digit for table in tables for digit in table["digit"].to_pylist()]


def one(args: argparse.Namespace) -> dict[str, float]:
    """Measure one way in this process."""
    if args.way == "worker":
        return train_in_worker(args.data, args.seconds)
    if args.way != "ray":
        return in_pytorch(args.what, args.way, args.data, args.seconds)
    return train_with_ray(args.data, args.epochs) if args.what == "train" else score_with_ray(args.data, args.rows)


def benchmark(argv: list[str]) -> tuple[dict[str, Any], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--data", default="auto", help="as for jobs/train.py (default: auto)")
    parser.add_argument("--seconds", type=float, default=20, help="length of each loop that is not Ray's (default: 20)")
    parser.add_argument("--epochs", type=int, default=3, help="train: epochs of each Ray run, the first uncounted (default: 3)")
    parser.add_argument("--rows", type=int, default=500_000, help="score: rows of each Ray run (default: 500000)")
    parser.add_argument("--way", choices=WAYS["train"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.epochs < 2:
        raise Refusal("--epochs: must be at least 2, the first is not counted")
    if args.data not in ("auto", "sample", "mnist") and "://" not in args.data:
        args.data = locate(args.data, "--data").text  # Ray's workers have another working folder
    if args.way:
        return one(args), job.DONE

    ways = WAYS[args.what]
    results: dict[str, list[dict[str, float]]] = {}
    for way in (*ways, *reversed(ways)):
        done = subprocess.run([sys.executable, __file__, *argv, "--way", way], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunFailed(f"{way} could not be measured; its error stands above")
        result = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(way, []).append(result)
        print(f"{way}: {result['rows_per_second']:,.0f} rows/s", file=sys.stderr, flush=True)
    means = {
        way: {key: sum(result[key] for result in of_way) / len(of_way) for key in of_way[0]} for way, of_way in results.items()
    }
    rates = {way: mean.pop("rows_per_second") for way, mean in means.items()}
    beside = {f"beside_{way}": round(rates["ray"] / rates[way], 3) for way in ways if way != "ray"}
    line = {
        "rows_per_second": {way: round(rate, 1) for way, rate in rates.items()},
        **beside,
        **{key: round(value, 4) for key, value in means["ray"].items()},
        "runs": {way: [round(result["rows_per_second"], 1) for result in of_way] for way, of_way in results.items()},
    }
    return line, job.DONE


def main(argv: list[str]) -> int:
    return job.run(benchmark, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
