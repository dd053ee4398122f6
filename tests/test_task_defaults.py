"""A task of inputs, labels and a network alone: what it learns, predicts and measures."""

from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistsum_ray import Batch, Classes, Integers, Numbers, Task, predict_rows
from mnistsum_ray.model.trial import try_task


class House(nn.Module):
    """Features of a house to its kind, its number of floors, its price, and two more numbers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"kind": 2, "floors": 4, "price": 1, "place": 2}
        self.heads = nn.ModuleDict({label: nn.Linear(3, size) for label, size in sizes.items()})

    def forward(self, batch: Batch) -> Any:
        return {label: head(batch["x"]) for label, head in self.heads.items()}


class Houses(Task):
    name = "houses"
    inputs = {"x": Numbers(3)}  # noqa: RUF012 - as a user writes it
    labels = {  # noqa: RUF012
        "kind": Classes(["flat", "villa"]),
        "floors": Integers(4),
        "price": Numbers(),
        "place": Numbers(2),
    }

    def network(self) -> nn.Module:
        return House()


class OnlyKind(Task):
    name = "kind"
    inputs = Houses.inputs
    labels = {"kind": Classes(["flat", "villa"])}  # noqa: RUF012

    def network(self) -> nn.Module:
        class First(nn.Linear):
            def forward(self, batch: Any) -> Tensor:
                return super().forward(batch["x"])

        return First(3, 2)


def test_a_task_of_several_labels_learns_predicts_and_measures_each() -> None:
    task = Houses()
    names = ["kind_accuracy", "floors_accuracy", "price_absolute_error"]
    assert [*try_task(task)] == names, "lists are predicted only with --probabilities"
    assert Houses.outputs == pa.schema(
        {
            "pred_kind": pa.string(),
            "kind_prob": pa.float32(),
            "pred_floors": pa.int64(),
            "floors_prob": pa.float32(),
            "pred_price": pa.float32(),
            "pred_place": pa.list_(pa.float32()),
        }
    )
    outputs = {
        "kind": torch.tensor([[0.0, 2.0], [3.0, 0.0]]),
        "floors": torch.tensor([[0.0, 0, 5, 0], [0, 1, 0, 0]]),
        "price": torch.tensor([[2.0], [5.0]]),
        "place": torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
    }
    batch = {
        "kind": torch.tensor([1, 1]),
        "floors": torch.tensor([2, 3]),
        "price": torch.tensor([2.0, 3.0]),
        "place": torch.tensor([[1.0, 3.0], [0.0, 0.0]]),
    }
    entropies = F.cross_entropy(outputs["kind"], batch["kind"], reduction="none")
    entropies += F.cross_entropy(outputs["floors"], batch["floors"], reduction="none")
    expected = (entropies + torch.tensor([0 + 2.0, 4 + 0.0])) / 4
    assert torch.allclose(task.loss(outputs, batch), expected)
    in_order = tuple(outputs[label] for label in Houses.labels)
    assert torch.equal(task.loss(in_order, batch), task.loss(outputs, batch))
    predicted = task.predict(outputs, batch)
    assert predicted["pred_kind"].tolist() == [1, 0]
    found = task.row_metrics(predicted, batch)
    assert {name: values.tolist() for name, values in found.items()} == {
        "kind_accuracy": [True, False],
        "floors_accuracy": [True, False],
        "price_absolute_error": [0, 2],
        "place_absolute_error": [1, 0],
    }


def test_a_class_is_predicted_by_its_name() -> None:
    assert try_task(OnlyKind()) == ("accuracy",)
    network: Any = OnlyKind().network()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([0.0, 1.0]))
    rows = {"x": [[1.0, 2.0, 3.0], None, [4.0, 5.0, 6.0]]}
    table = predict_rows(network, rows, OnlyKind)
    assert table["pred_kind"].to_pylist() == ["villa", None, "villa"]
    assert table.column_names == ["x", "pred_kind", "kind_prob", "reason"]
