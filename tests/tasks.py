"""A small task of another kind than the built-in one, for tests of what knows no task."""

from typing import ClassVar, Literal

import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mnistsum_ray import Batch, Integers, Numbers, Settings, Task


class PointSettings(Settings):
    hidden: int = Field(default=8, ge=1)
    """width of the hidden layer"""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """dropout rate [0.5]"""
    kind: Literal["plain", "deep"] = "plain"
    """kind of network"""


class Points(Task):
    """On which side of a line does a point lie?"""

    name = "points"
    inputs: ClassVar = {"place": Numbers(3)}
    labels: ClassVar = {"side": Integers(2, names=("side", "which"))}
    outputs = pa.schema({"pred_side": pa.int8(), "side_prob": pa.float32()})
    Settings = PointSettings

    def network(self) -> nn.Module:
        hidden, dropout = self.settings.hidden, nn.Dropout(self.settings.dropout or 0.0)
        return PointNetwork(nn.Linear(3, hidden), nn.ReLU(), dropout, nn.Linear(hidden, 2))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["side"], reduction="none")

    def predict(self, outputs: Tensor, batch: Batch) -> Batch:
        probability, side = outputs.softmax(1).max(1)
        return {"pred_side": side, "side_prob": probability}

    def row_metrics(self, predicted: Batch, batch: Batch) -> Batch:
        return {"accuracy": predicted["pred_side"] == batch["side"]}


class PointNetwork(nn.Sequential):
    def forward(self, batch: Batch) -> Tensor:
        values = batch["place"]
        for layer in self:
            values = layer(values)
        return values


def points(rows: int) -> Batch:
    """A batch."""
    generator = torch.Generator().manual_seed(1)
    places = torch.randn(rows, 3, generator=generator)
    return {"place": places, "side": (places[:, 0] > 0).long(), "row_id": torch.arange(rows)}
