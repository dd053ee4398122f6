"""What the built-in task makes of a row: draws, losses, metrics and predictions by definition."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.data.columns.base import Arrays
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.task import Batch
from tests.mnist import new_model, random_rows, task

ROWS = 12


def augmented(seed: int = 0, epoch: int = 0, **settings: float) -> dict[str, np.ndarray]:
    rows: Arrays = {"image": np.zeros((ROWS, 28, 28), np.uint8), "digit": np.zeros(ROWS, np.int64)}
    return task(**settings).augment(rows, RowRandom(seed, epoch, np.arange(ROWS)))


def test_what_is_drawn_for_a_row_is_pinned() -> None:
    """A change of these numbers is a change of every run's result."""
    assert augmented()["number"].tolist() == [1, 4, 1, 3, 4, 2, 4, 3, 4, 8, 9, 2]
    far = RowRandom(7, 3, np.array([0, 59_999, 2**40]))
    assert MnistSum().augment({}, far)["number"].tolist() == [2, 4, 0]
    assert "affine" not in augmented(distortion=0)
    pinned = [0.9543918, -0.0486454, -0.0302301, -0.0030756, 1.0640106, 0.0707326]
    matrices = augmented(distortion=1.0)["affine"]
    assert (matrices.dtype.name, matrices.shape) == ("float32", (ROWS, 6))
    assert matrices[0].tolist() == pytest.approx(pinned, abs=1e-6)


def plain_loss(network: Any, batch: Batch, smoothing: float) -> torch.Tensor:
    """By definition: the mean of two cross-entropies of smoothed labels, summed over the rows."""
    loss = torch.zeros(())
    answers = (batch["digit"], batch["digit"] + batch["number"])
    for logits, truth in zip(network(batch), answers, strict=True):
        one_hot = F.one_hot(truth, logits.shape[1])
        targets = (1 - smoothing) * one_hot + smoothing / logits.shape[1]
        loss = loss - (targets * logits.log_softmax(1)).sum() / 2
    return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_of_the_heads_with_the_gradient_of_smoothed_labels(
    smoothing: float,
) -> None:
    network, batch = new_model().train(), random_rows(ROWS)
    parameters = list(network.parameters())
    losses = task(label_smoothing=smoothing).loss(network(batch), batch)
    assert losses.shape == (ROWS,)
    for row in range(ROWS):
        alone = {key: values[row : row + 1] for key, values in batch.items()}
        assert losses[row].item() == pytest.approx(plain_loss(network, alone, 0).item(), rel=1e-4)
    ours = torch.autograd.grad(losses.sum(), parameters)
    expected = torch.autograd.grad(plain_loss(network, batch, smoothing), parameters)
    for gradient, theirs in zip(ours, expected, strict=True):
        assert (gradient - theirs).norm() <= 1e-4 * theirs.norm()


@torch.no_grad()
def test_held_out_rows_are_measured_with_all_numbers_as_by_a_plain_computation() -> None:
    network, batch = new_model(), random_rows(60)
    del batch["number"]
    of_rows: dict[str, float] = {}
    for start in (0, 32):
        some = {key: values[start : start + 32] for key, values in batch.items()}
        for name, values in task().evaluate(network, network(some), some).items():
            of_rows[name] = of_rows.get(name, 0) + float(values.double().sum())
    right, loss = 0, 0.0
    for number in range(10):
        numbers = torch.full((60,), number)
        digits, sums = network(batch | {"number": numbers})
        right += int((sums.argmax(1) == batch["digit"] + number).sum())
        loss += plain_loss(network, batch | {"number": numbers}, 0.0).item() / 60 / 10
    expected = {
        "pairs": 600,
        "loss": loss,
        "digit_accuracy": (digits.argmax(1) == batch["digit"]).double().mean().item(),
        "sum_accuracy": right / 600,
    }
    # Another order of sums may change an answer.
    found = task().reduce_metrics(60, of_rows)
    assert found == pytest.approx(expected, rel=1e-5, abs=0.001)
    assert list(found) == list(expected)
    assert type(found["pairs"]) is int


@torch.no_grad()
def test_predictions_are_the_surest_classes_and_a_scored_row_is_one_pair() -> None:
    network, batch = new_model(), random_rows(ROWS)
    outputs = network(batch)
    predicted = task().predict(outputs, batch)
    assert {*predicted} == {*MnistSum.outputs.names}
    for head, logits in zip(("digit", "sum"), outputs, strict=True):
        probabilities = predicted[f"{head}_probs"]
        torch.testing.assert_close(probabilities, logits.softmax(1))
        assert torch.equal(probabilities.max(1).values, predicted[f"{head}_prob"])
        assert torch.equal(logits.argmax(1), predicted[f"pred_{head}"].long())
    answers = predicted["pred_digit"] + batch["number"]
    assert torch.equal(predicted["consistent"], predicted["pred_sum"] == answers)
    known = {"pred_digit": torch.tensor([3, 4]), "pred_sum": torch.tensor([8, 9])}
    truth = {"digit": torch.tensor([3, 5]), "number": torch.tensor([5, 4])}
    measured = task().row_metrics(known, truth)
    assert {name: values.tolist() for name, values in measured.items()} == {
        "digit_accuracy": [True, False],
        "sum_accuracy": [True, True],
    }
    sums = {name: float(values.sum()) for name, values in measured.items()}
    assert task().reduce_metrics(2, sums) == {"digit_accuracy": 0.5, "sum_accuracy": 1.0}


def test_few_rows_have_a_recipe_of_their_own_unless_one_is_given() -> None:
    for rows, given, chosen in (
        (19_999, None, ("small", 3, 64)),
        (20_000, None, ("short", 5, 256)),
        (19_999, "long", ("long", 30, 128)),
    ):
        defaults = MnistSum(TrainConfig(recipe=given).settings).defaults(rows)
        assert (defaults["recipe"], defaults["epochs"], defaults["batch_size"]) == chosen
    said = r"^--recipe: input should be 'quick', 'short', 'long' or"
    with pytest.raises(RequestError, match=said):
        TrainConfig(recipe="longer")
