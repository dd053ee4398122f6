"""What a task is: what is learned from which columns. For rows of your own, write one.

A batch is a dict of tensors by the names of `inputs` and `labels`. Losses, metrics and predictions
are of each row: the jobs alone sum and count them. jobs/examples/shapes.py is a whole task.

Columns are Images(height, width, mode) and Photos(side), uint8 in a batch; Integers(below),
Classes(names) and Tokens(below, length), int64; Numbers() and, of lists, Numbers(length), float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeAlias

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from mnistsum_ray.data.columns.base import Arrays, Column
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.task_defaults import (
    default_loss,
    default_outputs,
    default_predictions,
    default_row_metrics,
)

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
    """Identifies the task. A job refuses the model of another one."""
    inputs: ClassVar[Mapping[str, Column]]
    """Columns that the network takes. A row with an unusable value is rejected."""
    augmented: ClassVar[frozenset[str]] = frozenset()
    """Inputs that `augment` draws; training data do not have them."""
    labels: ClassVar[Mapping[str, Column]]
    """Columns to learn. Training reads all; scoring reads those that a flag names."""
    outputs: ClassVar[pa.Schema]
    """Columns that scoring adds, lists only with `--probabilities`. Default: `default_outputs`.

    Text may be `pred_LABEL` of a label of Classes: `predict` returns the class's number.
    """
    Settings: ClassVar[type[Settings]] = Settings
    data_names: ClassVar[Mapping[str, str]] = {}
    """Values of `--data` that `named_data` knows, with their meanings; the first is the default."""
    bf16: ClassVar[bool] = True
    """Whether bfloat16, which keeps three decimals, is precise enough."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "outputs" not in own and isinstance(own.get("labels"), dict):
            cls.outputs = default_outputs(cls.labels)

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings

    @property
    def training_columns(self) -> dict[str, Column]:
        """Columns that a training reads."""
        read = {key: column for key, column in self.inputs.items() if key not in self.augmented}
        return read | dict(self.labels)

    @abstractmethod
    def network(self) -> "nn.Module":
        """Return a new network. It takes a batch and must treat each row alone.

        It returns a tensor, or a tuple, list or dict of tensors. It runs in bfloat16 where that is
        faster; its outputs are then converted to float32.
        """

    def loss(self, outputs: Any, batch: Batch) -> "Tensor":
        """Return the loss of each row, float32[n]. Default: see task_defaults.py."""
        return default_loss(self.labels, outputs, batch)

    def predict(self, outputs: Any, batch: Batch) -> "dict[str, Tensor]":
        """Return predictions by column of `outputs`: [n], or [n, length] for a list column."""
        return default_predictions(self.labels, outputs)

    def row_metrics(self, predicted: "dict[str, Tensor]", batch: Batch) -> "dict[str, Tensor]":
        """Return metrics by name, as numbers or booleans [n]. Default: accuracy, absolute error.

        Metrics whose names end in `accuracy` are shown in percent.
        """
        return default_row_metrics(self.labels, predicted, batch)

    def augment(self, batch: Arrays, draws: RowRandom) -> Arrays:
        """Return the training batch, changed or with more columns. Override this for augmentation.

        Take random numbers from `draws` only, so that a resumed run draws the same ones.
        """
        return batch

    def evaluate(self, network: "nn.Module", outputs: Any, batch: Batch) -> "dict[str, Tensor]":
        """Return `loss` and metrics of held-out rows, [n] each. Override for `augmented` inputs."""
        measured = self.row_metrics(self.predict(outputs, batch), batch)
        return {"loss": self.loss(outputs, batch), **measured}

    def reduce_metrics(self, rows: int, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of all rows, given their number and sums. Default: the means."""
        return {name: total / max(1, rows) for name, total in sums.items()}

    def optimizer(self, network: "nn.Module", weight_decay: float, *, bf16: bool) -> "Optimizer":
        """Return a PyTorch optimizer. Default: AdamW.

        The learning rate of a group is that of the run times its `lr_factor` (default 1). `bf16`
        says whether the run computes in bfloat16.
        """
        import torch

        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)

    def calibrate(self, network: "nn.Module", validation: Evaluated) -> dict[str, Any]:
        """Change the weights after the last epoch, on the CPU; return entries for model.json.

        The held-out rows are evaluated again afterwards. Override this to calibrate the network.
        """
        return {}

    def finish(self, network: "nn.Module", validation: Evaluated, test: Evaluated) -> Findings:
        """Return an analysis of the final network, on the CPU. Override this to look at errors."""
        return Findings()

    def count(self, predicted: Arrays, batch: Arrays) -> dict[str, Any]:
        """Return numbers, or lists of them, about scored rows; scoring sums them over all files.

        Called for all scored rows and again, with labels, for those whose labels are known: what
        the first call has is kept. Lists are predicted only with `--probabilities`.
        """
        return {}

    def describe(self, counts: Mapping[str, Any]) -> Findings:
        """Return what the report of a scoring has of the sums of `count`."""
        return Findings()

    def defaults(self, train_rows: int) -> dict[str, Any]:
        """`epochs`, `batch_size`, `learning_rate` and settings, where they are unset."""
        return {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3}

    def named_data(self, data: str) -> NamedData | None:
        """Return the rows that a value of `--data` names; None: it is a place of Parquet files."""
        return None
