"""A task that does not keep its promises is refused before anything runs, in one line."""

import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model.trial import try_task
from mnistsum_ray.task import Task
from tests.tasks import PointNetwork, Points


def test_whole_tasks_pass_and_a_programs_own_draws_stay_as_they_are() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert try_task(Points()) == ("accuracy",)
    assert try_task(MnistSum()) == ("digit_accuracy", "sum_accuracy")
    assert torch.equal(torch.rand(1), expected)


class Together(PointNetwork):
    """Subtracts the mean of a batch."""

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        place = batch["place"]
        return super().forward({"place": place - place.mean(0)})


def network_of(*layers: nn.Module, kind: Any = PointNetwork) -> Callable[[Task], Any]:
    return lambda _: kind(nn.Linear(3, 2), *layers)


def returns(value: Any) -> Callable[..., Any]:
    return lambda *_: value


SIDE, PROB = torch.zeros(4, dtype=torch.int8), torch.zeros(4)
BROKEN: list[tuple[str, Any, str]] = [
    ("network", returns("text"), "network must return a torch.nn.Module"),
    ("network", network_of(nn.BatchNorm1d(2)), "network has BatchNorm1d (1), by which the rows of"),
    ("network", network_of(kind=Together), "network must treat each row alone: in the company of"),
    ("network", network_of(nn.Linear(3, 2)), "network raised RuntimeError: mat1 and mat2 shapes"),
    (
        "loss",
        returns(PROB.mean()),
        "loss must return a tensor of floating-point numbers [4] for 4 ",
    ),
    ("loss", returns(SIDE), "rows, not int8[4]"),
    ("loss", returns(None), "rows, not NoneType"),
    ("loss", lambda _, outputs, batch: batch["sides"], "loss raised KeyError: 'sides'"),
    ("predict", returns([SIDE]), "predict must return a dict of tensors"),
    (
        "predict",
        returns({"pred_side": SIDE}),
        "outputs: ['pred_side', 'side_prob'], not ['pred_side']",
    ),
    (
        "predict",
        returns({"pred_side": SIDE, "side_prob": PROB, "x": PROB}),
        "not ['pred_side', 'side_prob', 'x']",
    ),
    ("predict", returns({"pred_side": PROB, "side_prob": PROB}), "tensor of whole numbers [4] for"),
    ("predict", returns({"pred_side": SIDE, "side_prob": PROB[:, None]}), "not float32[4, 1]"),
    (
        "outputs",
        pa.schema({"pred_side": pa.int8(), "side_prob": pa.list_(pa.float32())}),
        "length]",
    ),
    ("row_metrics", returns(PROB), "row_metrics must return a dict of tensors"),
    (
        "row_metrics",
        returns({"accuracy": PROB[:3]}),
        "row_metrics['accuracy'] must return a tensor of ",
    ),
]


@pytest.mark.parametrize(("method", "broken", "said"), BROKEN)
def test_a_broken_promise_is_named(method: str, broken: Any, said: str) -> None:
    task = type("Broken", (Points,), {method: broken})()
    with pytest.raises(RequestError, match=f"^task points: .*{re.escape(said)}") as error:
        try_task(task)
    assert "\n" not in str(error.value)
