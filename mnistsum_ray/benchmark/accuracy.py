"""Time to the original's result: from the command to a model that is as accurate on MNIST's test rows."""

import statistics
import sys
import tempfile
import time
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader

from mnistsum_ray.benchmark import original, ray_jobs
from mnistsum_ray.benchmark.memory import BATCH
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import Source, open_source

ORIGINAL_EPOCHS: Final = 5
ORIGINAL_DIGIT: Final = 0.9946
ORIGINAL_SUM: Final = 0.9927
"""Accuracies on the test rows that the original reports."""

_RECIPE: Final = "quick"

Result = dict[str, float]


def measure(argv: list[str], data: str, seeds: int) -> dict[str, Any]:
    """Measure the original once and jobs/train.py with each seed, each in its own process.

    Returns:
        The fields of the job's last line: accuracies on the test rows and seconds from the command, of the original, and of
        `ray` in the mean over the seeds; `reached`, whether that mean reaches both accuracies; and the quotient of the seconds.
    """
    theirs = _as_result(ray_jobs.run_job("benchmark", *argv, "--way", "loader", "--command-time", time.time(), name="loader"))
    _say("loader", theirs)
    ours = []
    for seed in range(seeds):
        ours.append(train(data, seed))
        _say(f"ray, seed {seed}", ours[-1])
    mean = {key: statistics.mean(result[key] for result in ours) for key in ours[0]}
    _say("ray, mean", mean)
    return {
        "what": "accuracy",
        "loader": theirs,
        "ray": mean,
        "seeds": ours,
        "reached": mean["digit_accuracy"] >= ORIGINAL_DIGIT and mean["sum_accuracy"] >= ORIGINAL_SUM,
        "times_faster": round(theirs["seconds"] / mean["seconds"], 2),
    }


def train(data: str, seed: int) -> Result:
    """Run jobs/train.py with the recipe `quick`, to its last line, which says that the model is published."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", data, "--recipe", _RECIPE, "--seed", seed, "--storage-path", folder, "--name", "accuracy"]
        line, seconds = ray_jobs.time_job("train", *flags)
    return _as_result(line["test"] | {"seconds": seconds})


def train_original(data: str, device: torch.device, command_time: float) -> Result:
    """The original's way: five epochs over all training rows, then the test rows, with a random number each."""
    source = open_source(data)
    images, digits = _rows(source, np.concatenate([source.train.ids(), source.validation.ids()]))
    model = original.train_epochs(images, digits, ORIGINAL_EPOCHS, device).eval()
    rows, digit_hits, sum_hits = 0, 0, 0
    with torch.no_grad():
        for image, number, digit, total in DataLoader(original.OriginalDataset(*_rows(source, source.test.ids())), BATCH):
            scores = model(image.to(device), number.to(device))
            digit_predicted, sum_predicted = (values.argmax(1).cpu() for values in scores)
            rows += len(digit)
            digit_hits += int((digit_predicted == digit).sum())
            sum_hits += int((sum_predicted == total).sum())
    return {
        "digit_accuracy": digit_hits / rows,
        "sum_accuracy": sum_hits / rows,
        "seconds": time.time() - command_time,
    }


def _rows(source: Source, ids: np.ndarray) -> tuple[Pixels, list[int]]:
    """Images and digits of rows."""
    images, digits = source.data.fetch(ids)
    return images, digits.tolist()


def _as_result(line: dict[str, Any]) -> Result:
    return {key: line[key] for key in ("digit_accuracy", "sum_accuracy", "seconds")}


def _say(name: str, result: Result) -> None:
    accuracies = f"digit {result['digit_accuracy']:.2%}, sum {result['sum_accuracy']:.3%}"
    print(f"{name}: {accuracies}, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
