"""The steps of an epoch. What a row is given there: tests/integration/test_rows.py."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mnistsum_ray.data.columns.base import Arrays
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.errors import RunError, TaskError
from mnistsum_ray.mnist.task import MnistSettings, MnistSum
from mnistsum_ray.model.device import seed_generators
from mnistsum_ray.task import Batch, Task
from mnistsum_ray.training.worker import Augment, EpochSteps, Objective, ToTensors, Worker
from tests.tasks import Points, PointSettings, points
from tests.training import CPU, as_worker, new_worker

SHARDS = [
    ((1000,), 64, 16, [64] * 15 + [40]),
    ((64, 64), 64, 2, [64, 64]),
    ((70, 32), 64, 3, [64, 32, 6]),  # in the last step the second rank has no rows
    ((100, 90, 101), 32, 10, [32] * 8 + [23, 12]),  # of 10, 11 and 11 rows
    ((3, 0, 5), 4, 3, [2 + 1, 2 + 1, 1 + 1]),
]


@pytest.mark.parametrize(("shards", "batch_size", "count", "batch_rows"), SHARDS)
def test_the_steps_of_an_epoch_take_every_row_of_unequal_shards(
    shards: tuple[int, ...], batch_size: int, count: int, batch_rows: list[int]
) -> None:
    steps = EpochSteps(shards, batch_size)
    assert sum(steps.share(rank) for rank in range(len(shards))) == batch_size
    assert steps.count == count
    assert [steps.batch_rows(step) for step in range(count)] == batch_rows
    assert sum(batch_rows) == sum(shards)
    assert steps.batch_rows(count) == 0


ALL: dict[str, Any] = {"distortion": 1.0, "label_smoothing": 0.05, "dropout": 0.25}
TASKS: list[Task] = [Points(PointSettings(dropout=0.5)), MnistSum(MnistSettings(**ALL))]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_worker_without_rows_has_gradients_of_zero(task: Task, bf16: bool, device: str) -> None:
    network = task.network().to(device)
    objective = Objective(task, network, bf16=bf16)
    no_rows = {key: values.to(device) for key, values in Augment(task, 0, 0).zeros(2).items()}
    loss = objective(no_rows, 0)
    assert loss.item() == 0
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert objective(no_rows, 2).item() > 0


def weights_after(worker: Worker, batch: Batch, rows: int, of_rows: int) -> dict[str, Tensor]:
    worker._step(batch, rows, of_rows, learning_rate=0.1)
    return {name: value.clone() for name, value in worker.network.state_dict().items()}


class Plain(Points):
    def optimizer(self, network: nn.Module, weight_decay: float, *, bf16: bool) -> Any:
        first, *others = network.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr_factor": 0.5}, {"params": others}]
        return torch.optim.SGD(groups, weight_decay=weight_decay)


def test_a_step_is_down_the_mean_loss_of_the_rows_of_all_ranks_at_the_rate_of_each_group() -> None:
    """Another rank has 24 of 32 rows, which a worker alone leaves out; others are not counted."""
    worker = as_worker(lambda: new_worker(Plain(), weight_decay=0))
    before = {name: value.clone() for name, value in worker.network.named_parameters()}
    batch = points(10)
    loss = Points().loss(worker.network(batch), batch)[:8].sum() / 32
    gradients = torch.autograd.grad(loss, [*worker.network.parameters()])
    after = weights_after(worker, batch, 8, 32)
    for index, (name, start) in enumerate(before.items()):
        rate = 0.05 if index == 0 else 0.1
        torch.testing.assert_close(after[name], start - rate * gradients[index])
    assert all(
        torch.equal(value, after[name])
        for name, value in weights_after(worker, batch, 0, 24).items()
    ), "a step without rows"


def test_what_is_random_in_a_step_follows_from_its_seed_whatever_came_before() -> None:
    """Such as in nn.Dropout: a run that goes on has the same bits."""
    task, found = TASKS[0], []
    torch.manual_seed(0)
    network = task.network().train()
    for drawn, seed in ((0, 7), (3, 7), (0, 8)):
        torch.rand(drawn)
        seed_generators(CPU, seed)
        found.append(Objective(task, network, bf16=False)(points(50), 50).item())
    assert found[0] == found[1] != found[2]


def test_batches_have_the_tasks_columns_and_row_ids_as_tensors_of_their_own() -> None:
    rows = {"place": np.ones((2, 3), np.float32), "side": np.array([0, 1])}
    rows |= {"row_id": np.array([7, 2**62]), "other": np.array(["a", "b"])}
    for collate in (ToTensors(Points().training_columns), Augment(Points(), 0, 0)):
        batch = collate(rows)
        assert {*batch} == {"place", "side", "row_id"}
        assert batch["row_id"].tolist() == [7, 2**62]
        batch["place"] += 1
        assert (rows["place"] == 1).all()


def augmenting(change: Any) -> Task:
    def augment(_: Task, batch: Arrays, draws: RowRandom) -> Any:
        return change(batch, draws)

    made: type[Task] = type("Augmenting", (Points,), {"augment": augment})
    return made()


BROKEN: list[tuple[Any, str]] = [
    (lambda batch, _: {"side": batch["side"]}, "augment must return 'place' too"),
    (
        lambda batch, _: batch | {"x": batch["side"][:1]},
        "augment raised ValueError: x has 1 rows, ",
    ),
    (lambda batch, _: batch["sides"], "augment raised KeyError: 'sides'"),
]


def test_augment_draws_by_seed_epoch_and_row_and_what_it_breaks_is_named() -> None:
    noisy = augmenting(lambda batch, draws: batch | {"noise": draws.uniform("noise", 2)})
    rows = ToTensors(Points().training_columns).zeros(2)
    arrays = {key: values.numpy() for key, values in rows.items()}
    arrays["row_id"] = np.array([3, 4])
    noise = Augment(noisy, 1, 2)(arrays)["noise"]
    assert noise.tolist() == RowRandom(1, 2, np.array([3, 4])).uniform("noise", 2).tolist()
    for change, said in BROKEN:
        with pytest.raises(TaskError, match=f"^task points: {said}"):
            Augment(augmenting(change), 0, 0)(arrays)


class MeanLoss(Points):
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return super().loss(outputs, batch).mean()


def test_a_loss_that_is_not_of_each_row_or_is_infinite_is_named() -> None:
    objective = Objective(MeanLoss(), Points().network(), bf16=False)
    said = r"^task points: loss raised ValueError: must return a loss for each of 5 rows, not \[\]"
    with pytest.raises(TaskError, match=said):
        objective(points(5), 5)
    worker = as_worker(lambda: new_worker(Points(), learning_rate=0.3))
    with pytest.raises(RunError, match=r"^here nan; lower --learning-rate \(now 0.3\)$"):
        worker.check_finite(float("nan"), "here")
