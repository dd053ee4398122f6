"""What a task is: what is learnt from which columns. For rows of your own, write one.

A batch is a dict of tensors by the names of `inputs` and `labels`. Losses, metrics and predictions
are of each row: the jobs alone sum and count them. jobs/examples/shapes.py is a whole task.

Columns are Images(height, width, mode) and Photos(side), uint8 in a batch; Whole(below), int64, for
classes and other whole numbers; Floats() and, of lists, Floats(length), float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeAlias

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mnistsum_ray.data.columns import Arrays, Column
from mnistsum_ray.data.randomness import Draws

if TYPE_CHECKING:  # they take seconds to import, and `--help` does not need them
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from torch.optim import Optimizer

Batch: TypeAlias = "dict[str, Tensor]"
Evaluated: TypeAlias = "list[tuple[Batch, Any]]"
"""Batches of held-out rows, each with the network's outputs for it, on the CPU."""
Table: TypeAlias = tuple[str, tuple[Any, ...], list[tuple[Any, ...]]]
"""A table of a report: title, names of the columns, and rows."""

BUILT_IN: Final = "mnistsum_ray.mnist.task:MnistSum"


class Settings(BaseModel):
    """A task's own settings, each a flag with its docstring as help; None is set by `defaults`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NamedData(NamedTuple):
    """Rows that a task finds by itself."""

    name: str
    data: str  # the value of `--data` that finds the same rows again
    location: str
    splits: dict[str, Arrays]  # by split, train and any of validation and test
    notice: str = ""  # for the console and the report, e.g. that it is a sample


@dataclass(frozen=True)
class Findings:
    """What is found out about a network or scored rows; pictures have title and file name."""

    manifest: dict[str, Any] = field(default_factory=dict)  # entries of manifest.json
    model: dict[str, Any] = field(default_factory=dict)  # entries of model.json
    tables: list[Table] = field(default_factory=list)  # of the report
    pictures: "Mapping[str, tuple[str, Callable[[], Figure]]]" = field(default_factory=dict)
    notice: str = ""  # for the console and the report


class Task(ABC):
    """A task. Its class must be importable by name, or lie in the file that `--task` names."""

    name: ClassVar[str]
    """A model of one task is refused by another."""
    inputs: ClassVar[Mapping[str, Column]]
    """What the network takes; a row with a value that cannot be used is rejected."""
    drawn: ClassVar[frozenset[str]] = frozenset()
    """Inputs that no training data have, since `augment` draws them."""
    labels: ClassVar[Mapping[str, Column]]
    """What is learnt. Training reads them; scoring reads those that a flag names."""
    outputs: ClassVar[pa.Schema]
    """Columns that scoring adds; lists of numbers only with `--probabilities`."""
    Settings: ClassVar[type[Settings]] = Settings
    data_names: ClassVar[Mapping[str, str]] = {}
    """Values of `--data` that `named_data` knows, with their meanings; the first is the default."""
    bf16: ClassVar[bool] = True
    """Whether bfloat16, which keeps three decimal places, is precise enough."""

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings

    @property
    def training_columns(self) -> dict[str, Column]:
        """Columns that a training reads."""
        read = {key: column for key, column in self.inputs.items() if key not in self.drawn}
        return read | dict(self.labels)

    @abstractmethod
    def network(self) -> "nn.Module":
        """A new network: it takes a batch, treats each row alone, and returns a tensor, or tensors
        in a tuple, list or dict. It computes in bfloat16 where that is faster; outputs get float32.
        """

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> "Tensor":
        """The loss of each row, float32[n]."""

    @abstractmethod
    def predict(self, outputs: Any, batch: Batch) -> "dict[str, Tensor]":
        """Predictions of each row by column of `outputs`, numbers of its type: [n], [n, length]."""

    @abstractmethod
    def judge(self, predicted: "dict[str, Tensor]", batch: Batch) -> "dict[str, Tensor]":
        """Metrics of each row by their names, numbers or booleans [n].

        Names that end in `accuracy` are shown in percent.
        """

    def augment(self, batch: Arrays, draws: Draws) -> Arrays:
        """Change a training batch, or add to it: NumPy, beside the steps. What is random must come
        from `draws`, so that a run that goes on has the same bits."""
        return batch

    def evaluate(self, network: "nn.Module", outputs: Any, batch: Batch) -> "dict[str, Tensor]":
        """`loss` and metrics of each held-out row, [n] each. Overridden if inputs are `drawn`."""
        judged = self.judge(self.predict(outputs, batch), batch)
        return {"loss": self.loss(outputs, batch), **judged}

    def metrics(self, rows: int, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of so many rows, of the sums of what `evaluate` or `judge` gives: their means."""
        return {name: total / max(1, rows) for name, total in sums.items()}

    def optimizer(self, network: "nn.Module", weight_decay: float, *, bf16: bool) -> "Optimizer":
        """An optimizer of PyTorch. A group's rate is its `factor`, 1 by default, times the run's.
        `bf16` says whether the run computes in bfloat16."""
        import torch

        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)

    def calibrate(self, network: "nn.Module", validation: Evaluated) -> dict[str, Any]:
        """Called after the last epoch, on the CPU: may change the weights, before held-out rows are
        evaluated for the last time. Returns entries of model.json."""
        return {}

    def finish(self, network: "nn.Module", validation: Evaluated, test: Evaluated) -> Findings:
        """Called last, on the CPU: may analyse the errors of the network, which is final now."""
        return Findings()

    def count(self, predicted: Arrays, batch: Arrays) -> dict[str, Any]:
        """Numbers or lists of numbers of some scored rows, which scoring sums over all files.

        Called for all scored rows and again, with labels, for those whose labels are known: what
        the first call has is kept. Lists are predicted only with `--probabilities`.
        """
        return {}

    def describe(self, counts: Mapping[str, Any]) -> Findings:
        """What the report of a scoring has of the sums of `count`."""
        return Findings()

    def defaults(self, train_rows: int) -> dict[str, Any]:
        """`epochs`, `batch_size`, `learning_rate` and settings, where they are not given."""
        return {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3}

    def named_data(self, data: str) -> NamedData | None:
        """The rows that a value of `--data` names; None: it is a place of Parquet files."""
        return None
