"""What a training computes: each thing that decides the model, and nothing that must not."""

import io
import itertools
import queue
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from mnistsum_ray.config import Hyperparameters
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.randomness import Purpose, RowTotals, random_numbers, step_seed
from mnistsum_ray.model.folder import checksum, copy_weights
from mnistsum_ray.model.metrics import FinishedModel
from mnistsum_ray.model.network import Objective, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW, one_cycle
from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.training import loop, trainer
from mnistsum_ray.training.loop import LoopConfig, Start, train_loop_per_worker
from mnistsum_ray.training.progress import EventFollower
from tests.jobs import wait_until
from tests.training import as_worker, hyperparameters, new_trainer

ROWS = {"train": range(96), "validation": range(96, 136), "test": range(136, 176)}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """That of tests/integration, if this process has it: a start costs six seconds."""
    if ray.is_initialized():
        yield
    else:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


CHOSEN = np.random.default_rng(0).permutation(5000)
"""Of the sample, which is sorted by digit."""


@pytest.fixture(scope="module")
def digits(sample: pa.Table) -> dict[str, np.ndarray]:
    """True digits of the rows of each split."""
    true = sample["digit"].to_numpy().astype(np.int64)[CHOSEN]
    return {split: true[list(rows)] for split, rows in ROWS.items()}


@pytest.fixture(scope="module")
def images(pixels: Pixels) -> dict[str, Pixels]:
    return {split: pixels[CHOSEN][list(rows)] for split, rows in ROWS.items()}


@pytest.fixture(scope="module")
def parameters() -> Hyperparameters:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 20, "precision": "fp32"}
    return hyperparameters(**settings, learning_rate=0.02, dropout=0.1, distortion=0.5)


class Training:
    """A training in this process, as Ray Train runs it on one worker."""

    def __init__(
        self,
        images: dict[str, Pixels],
        digits: dict[str, np.ndarray],
        parameters: Hyperparameters,
        start: Start | None = None,
    ) -> None:
        datasets, totals = {}, {}
        for split, rows in ROWS.items():
            ids = np.arange(rows.start, rows.stop)
            table = {
                "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images[split]),
                "digit": digits[split],
                "row_id": ids,
            }
            datasets[split] = ray.data.from_blocks([pa.table(table)])
            totals[split] = RowTotals.of(ids)
        events: Any = queue.Queue()  # of this process, in place of Ray's
        loop = LoopConfig(parameters, 1, totals, events, start or Start())
        finished = as_worker(lambda: train_loop_per_worker({"loop": loop}), datasets)
        assert finished is not None
        self.finished: FinishedModel = finished
        self.events = [events.get() for _ in range(events.qsize())]
        self.weights = finished.description["trained_sha256"]
        self.temperatures = finished.description["temperatures_in_weights"]


@pytest.mark.slow
def test_held_out_digits_change_nothing_that_is_trained(
    images: dict[str, Pixels], digits: dict[str, np.ndarray], parameters: Hyperparameters
) -> None:
    """The test rows are for the figures alone; the validation rows also for the temperatures."""
    parameters = replace(parameters, epochs=6)  # of a model that knows no digit none would fit
    plain = Training(images, digits, parameters)
    again = Training(images, digits, parameters)
    assert (again.weights, again.temperatures) == (plain.weights, plain.temperatures)
    other_test = Training(images, digits | {"test": digits["test"][::-1]}, parameters)
    assert (other_test.weights, other_test.temperatures) == (plain.weights, plain.temperatures)
    assert other_test.finished.history[-1]["test"] != plain.finished.history[-1]["test"]
    reversed_rows = digits | {"validation": digits["validation"][::-1]}
    other_validation = Training(images, reversed_rows, parameters)
    assert other_validation.weights == plain.weights
    assert other_validation.temperatures != plain.temperatures
    # Folded into the weights, they divide the digit logits.
    undivided = []
    for training in (plain, other_validation):
        weight = training.finished.weights["conv7.weight"]
        undivided.append(weight * training.temperatures["digit"])
    assert torch.allclose(*undivided)


def test_the_seed_decides_the_first_weights() -> None:
    firsts = []
    for seed in (0, 0, 1):
        trainer = as_worker(lambda seed=seed: new_trainer(seed=seed))  # type: ignore[misc]
        firsts.append(checksum(copy_weights(trainer.model)))
    assert firsts[0] == firsts[1] != firsts[2]


CHANGES: list[dict[str, Any]] = [
    {"epochs": 1},
    {"batch_size": 24},
    {"learning_rate": 0.021},
    {"weight_decay": 0.2},
    {"label_smoothing": 0.3},
    {"dropout": 0.2},
    {"distortion": 0.6},
    {"seed": 1},
    {"precision": "bf16"},
]


@pytest.mark.slow
def test_each_hyperparameter_decides_the_model(
    images: dict[str, Pixels], digits: dict[str, np.ndarray], parameters: Hyperparameters
) -> None:
    models = {Training(images, digits, parameters).weights}
    for change in CHANGES:
        models.add(Training(images, digits, replace(parameters, **change)).weights)
    assert len(models) == 1 + len(CHANGES)
    assert {name for change in CHANGES for name in change} == set(vars(parameters))


def test_one_schedule_of_rates_and_one_dropout_a_step_over_all_epochs(
    images: dict[str, Pixels],
    digits: dict[str, np.ndarray],
    parameters: Hyperparameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    seeds: list[int] = []
    set_rate, make_seed = MuonAdamW.set_learning_rate, torch.Generator.manual_seed

    def note_rate(optimizer: MuonAdamW, rate: float) -> None:
        rates.append(rate)
        set_rate(optimizer, rate)

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return make_seed(self, seed)

    monkeypatch.setattr(MuonAdamW, "set_learning_rate", note_rate)
    monkeypatch.setattr(torch, "Generator", Generator)
    Training(images, digits, replace(parameters, seed=3))
    # 96 rows in batches of 20 are five steps an epoch; the first rate is that of no step.
    assert rates == [0.0] + [one_cycle(step, 10, parameters.learning_rate) for step in range(10)]
    steps = itertools.product((0, 1), range(5))
    assert seeds == [step_seed(3, *step, Purpose.DROPOUT) for step in steps]
    assert len(set(seeds)) == 10


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows_and_numbers(
    images: dict[str, Pixels],
    digits: dict[str, np.ndarray],
    parameters: Hyperparameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a model that learns nothing, in another order and at once; each look at a clock is 4 s."""
    for module in (trainer, loop):
        clock = itertools.count(100.0, 4.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.__next__))
    still = replace(parameters, epochs=1, learning_rate=1e-12, dropout=0.0, distortion=0.0)
    torch.manual_seed(9)
    model = make_network()
    training = Training(images, digits, still, Start(weights=model.state_dict()))
    ids = np.array(ROWS["train"])
    numbers = torch.from_numpy(random_numbers(still.seed, 0, ids).astype(np.int64))
    with torch.no_grad():
        true = torch.from_numpy(digits["train"].copy())
        pixels = prepare_images(torch.tensor(images["train"]))
        exact = Objective(model, 0.0, bf16=False)(pixels, numbers, true, None)[1]
    (line,) = training.finished.history
    assert line["train_loss"] == pytest.approx(exact.item() / 96, rel=1e-4)
    last_step, _ = line["step_losses"][-1]
    assert last_step == 5
    # The training looks at its clock at its begin, after the last step, and at its end.
    times = [line[name] for name in ("seconds", "rows_per_second", "evaluation_seconds")]
    assert times == [8.0, 96 / 8, 4.0]
    (progress,) = [event for event in training.events if event["kind"] == "progress"][-1:]
    assert (progress["rows"], progress["of_rows"], progress["epoch"]) == (96, 96, 1)
    assert progress["rows_per_second"] == 96 / 4
    assert progress["loss"] == line["train_loss"]


def test_a_line_says_that_the_workers_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.5)
    lines = io.StringIO()
    follower = EventFollower(Console(lines), JobMetrics("train", "run"), print)
    said = "no word from the workers for 1 s: they are being started or replaced, or wait for each "
    with follower.following():
        wait_until(lambda: said in lines.getvalue())
    assert re.search(r"\d CPUs? and 0 GPUs are free \(2 CPUs and 0 GPUs on 1", lines.getvalue())
