"""What a training computes: each thing that decides the model, and nothing that must not."""

import io
import itertools
import math
import queue
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from mnistsum_ray.data.columns.base import Array
from mnistsum_ray.data.decoding import RowTotals
from mnistsum_ray.data.randomness import Purpose, RowRandom, seeds
from mnistsum_ray.errors import RunError
from mnistsum_ray.mnist.task import MnistSettings, MnistSum
from mnistsum_ray.model.finished import FinishedModel
from mnistsum_ray.model.folder import Weights, checksum, copy_weights
from mnistsum_ray.model.schedule import one_cycle
from mnistsum_ray.reporting import console
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import Findings
from mnistsum_ray.training import loop, worker
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.progress import EventFollower
from tests.jobs import wait_until
from tests.tasks import Points
from tests.training import as_worker, hyperparameters, new_worker

NO_RUN = Location("/nowhere")

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
def images(pixels: Array) -> dict[str, Array]:
    return {split: pixels[CHOSEN][list(rows)] for split, rows in ROWS.items()}


SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 20,
    "precision": "fp32",
    "learning_rate": 0.02,
    "weight_decay": 0.01,
    "seed": 0,
    "dropout": 0.1,
    "distortion": 0.5,
    "label_smoothing": 0.05,
}


class Training:
    """A training in this process, as Ray Train runs it on one worker."""

    def __init__(
        self,
        images: dict[str, Array],
        digits: dict[str, np.ndarray],
        weights: Weights | None = None,
        kind: type[MnistSum] = MnistSum,
        **changed: Any,
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
        given = SETTINGS | changed
        of_task = {key: given[key] for key in given if key in MnistSettings.model_fields}
        task, parameters = kind(MnistSettings(**of_task)), hyperparameters(**given)
        events: Any = queue.Queue()  # of this process, in place of Ray's
        loop = LoopConfig(task, "code", parameters, 1, totals, 32, events, NO_RUN, weights)
        finished = as_worker(lambda: train_loop_per_worker({"loop": loop}), datasets)
        assert finished is not None
        self.finished: FinishedModel = finished
        self.events = [events.get() for _ in range(events.qsize())]
        self.weights = finished.description["trained_sha256"]
        self.temperatures = finished.description.get("temperatures_in_weights", {})


@pytest.mark.slow
def test_held_out_digits_change_nothing_that_is_trained(
    images: dict[str, Array], digits: dict[str, np.ndarray]
) -> None:
    """The test rows are for the figures alone; the validation rows also for the temperatures."""
    epochs: dict[str, Any] = {"epochs": 6}  # of a model that knows no digit none would fit
    plain = Training(images, digits, **epochs)
    again = Training(images, digits, **epochs)
    assert (again.weights, again.temperatures) == (plain.weights, plain.temperatures)
    other_test = Training(images, digits | {"test": digits["test"][::-1]}, **epochs)
    assert (other_test.weights, other_test.temperatures) == (plain.weights, plain.temperatures)
    assert other_test.finished.history[-1]["test"] != plain.finished.history[-1]["test"]
    reversed_rows = digits | {"validation": digits["validation"][::-1]}
    other_validation = Training(images, reversed_rows, **epochs)
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
        made = as_worker(lambda seed=seed: new_worker(seed=seed))  # type: ignore[misc]
        firsts.append(checksum(copy_weights(made.network)))
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
    images: dict[str, Array], digits: dict[str, np.ndarray]
) -> None:
    models = {Training(images, digits).weights}
    for change in CHANGES:
        models.add(Training(images, digits, **change).weights)
    assert len(models) == 1 + len(CHANGES)
    of_task = {*MnistSettings.model_fields} - {"recipe"}  # which chooses the others
    assert {name for change in CHANGES for name in change} == {*vars(hyperparameters()), *of_task}


def test_one_schedule_of_rates_and_one_seed_a_step_over_all_epochs(
    images: dict[str, Array], digits: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    given: list[int] = []

    class Noted(MnistSum):
        def optimizer(self, network: Any, weight_decay: float, *, bf16: bool) -> Any:
            made = super().optimizer(network, weight_decay, bf16=bf16)
            made.register_step_pre_hook(lambda *_: rates.append(made.param_groups[1]["lr"]))
            return made

    monkeypatch.setattr(worker, "seed_generators", lambda _, seed: given.append(seed))
    Training(images, digits, kind=Noted, seed=3)
    # 96 rows in batches of 20 are five steps an epoch.
    assert rates == [one_cycle(step, 10, 0.02) * 0.15 for step in range(10)]
    assert given == [*seeds(3, 0, Purpose.STEP, range(5)), *seeds(3, 1, Purpose.STEP, range(5))]
    assert len(set(given)) == 10


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows_and_numbers(
    images: dict[str, Array],
    digits: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a model that learns nothing, in another order and at once; each look at a clock is 4 s."""
    for module in (worker, loop):
        clock = itertools.count(100.0, 4.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.__next__))
    torch.manual_seed(9)
    network = MnistSum().network()
    still: dict[str, Any] = {"epochs": 1, "learning_rate": 1e-12, "dropout": 0, "distortion": 0}
    still["batch_size"] = 4  # four steps more than between two looks at the loss
    training = Training(images, digits, network.state_dict(), **still)
    numbers = RowRandom(0, 0, np.array(ROWS["train"])).whole(1, 10)
    batch = {
        "image": torch.tensor(images["train"]),
        "digit": torch.from_numpy(digits["train"].copy()),
        "number": torch.from_numpy(numbers),
    }
    with torch.no_grad():
        exact = MnistSum().loss(network(batch), batch).mean()
    (line,) = training.finished.history
    assert line["train_loss"] == pytest.approx(exact.item(), rel=1e-4)
    assert [step for step, _ in line["step_losses"]] == [24]
    # The training looks at its clock at its begin, after the last step, and at its end.
    times = [line[name] for name in ("seconds", "rows_per_second", "evaluation_seconds")]
    assert times == [8.0, 96 / 8, 4.0]
    (progress,) = [event for event in training.events if event["kind"] == "progress"][-1:]
    assert (progress["rows"], progress["of_rows"], progress["epoch"]) == (96, 96, 1)
    assert progress["rows_per_second"] == 96 / 4
    assert progress["loss"] == line["train_loss"]


class Finishing(Points):
    """Its calibration sets the last layer to zero, so that its answers are known."""

    def calibrate(self, network: Any, validation: Any) -> dict[str, Any]:
        with torch.no_grad():
            network[3].weight.zero_()
            network[3].bias.zero_()
        return {"calibrated_with": sum(len(batch["side"]) for batch, _ in validation)}

    def finish(self, network: Any, validation: Any, test: Any) -> Findings:
        rows = [sum(len(batch["side"]) for batch, _ in split) for split in (validation, test)]
        for _, outputs in (*validation, *test):
            assert not outputs.any(), "they are those of the network before"
        return Findings(manifest={"rows": rows}, model={"extra": 1})


class Changing(Finishing):
    def finish(self, network: Any, validation: Any, test: Any) -> Findings:
        network[0].bias.data += 1
        return Findings()


def train_points(task: Points) -> FinishedModel:
    """Train a task of another kind than the built-in one, with 200, 300 and 400 rows."""
    places = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32)
    datasets, totals, ids = {}, {}, np.arange(400)
    for split, rows in {"train": slice(200), "validation": slice(300), "test": slice(400)}.items():
        table = {"place": pa.FixedShapeTensorArray.from_numpy_ndarray(places[rows])}
        table |= {"side": (places[rows, 0] > 0).astype(np.int64), "row_id": ids[rows]}
        datasets[split] = ray.data.from_blocks([pa.table(table)])
        totals[split] = RowTotals.of(ids[rows])
    parameters = hyperparameters(epochs=12, batch_size=20, learning_rate=0.05, precision="fp32")
    events: Any = queue.Queue()
    given = LoopConfig(task, "code", parameters, 1, totals, 32, events, NO_RUN, None)
    finished = as_worker(lambda: train_loop_per_worker({"loop": given}), datasets)
    assert finished is not None
    return finished


def test_a_task_of_another_kind_is_trained_and_what_is_published_is_of_its_final_weights() -> None:
    """Its evaluation is the mean of `row_metrics`; it is calibrated and analysed on the CPU."""
    finished = train_points(Finishing())
    assert finished.history[-1]["test"].keys() == {"rows", "loss", "accuracy"}
    assert finished.history[-1]["test"]["rows"] == 400
    assert finished.history[-1]["test"]["accuracy"] > 0.95
    assert finished.findings.manifest == {"rows": [300, 400]}
    assert (finished.description["calibrated_with"], finished.description["extra"]) == (300, 1)
    assert not finished.weights["3.weight"].any()
    assert finished.description["sha256"] != finished.description["trained_sha256"]
    for split, rows in (("validation", 300), ("test", 400)):
        measured = finished.description[split]
        assert measured["rows"] == rows
        assert measured["loss"] == pytest.approx(math.log(2)), "of a network that knows nothing"
        assert measured["loss"] > finished.history[-1][split]["loss"] + 0.1


def test_without_a_calibration_the_metrics_of_the_last_epoch_are_published() -> None:
    finished = train_points(Points())
    description = finished.description
    assert description["sha256"] == description["trained_sha256"]
    assert [description[split] for split in ("validation", "test")] == [
        finished.history[-1][split] for split in ("validation", "test")
    ]


def test_an_analysis_that_changes_the_network_is_refused() -> None:
    """What was measured before would be published with it."""
    with pytest.raises(RunError, match=r"^task points: finish must not change the network: calib"):
        train_points(Changing())


def test_a_line_says_that_the_workers_are_silent_or_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.5)
    lines = io.StringIO()
    follower = EventFollower(Console(lines), JobMetrics("train", "run"), print)
    said = "no word from the workers for 1 s: they are being started or replaced, or wait for each "
    with follower.following():
        wait_until(lambda: said in lines.getvalue())
        ray.kill(follower.queue.actor)
        lost = "the queue of the workers' events is lost; the next lines say how the training ends"
        wait_until(lambda: lost in lines.getvalue())
    assert re.search(r"\d CPUs? and 0 GPUs are free \(2 CPUs and 0 GPUs on 1", lines.getvalue())
