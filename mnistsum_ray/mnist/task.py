"""The built-in task: the digit of an image of MNIST, and digit + number."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import pyarrow as pa
from pydantic import Field

from mnistsum_ray.data.columns import Images, Integers
from mnistsum_ray.data.columns.base import Arrays
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.mnist import DIGITS, HEADS, NUMBERS, SIDE, datasets, report
from mnistsum_ray.task import Batch, Evaluated, Findings, NamedData, Settings, Task

if TYPE_CHECKING:  # `--help` needs no torch, which takes seconds to import
    from torch import Tensor, nn
    from torch.optim import Optimizer

FEW_ROWS: Final = 20_000

_RECIPES: Final[dict[str, dict[str, Any]]] = {
    "quick": {
        "epochs": 1,
        "batch_size": 128,
        "learning_rate": 0.05,
        "distortion": 0.5,
        "label_smoothing": 0.05,
        "dropout": 0.0,
    },
    "short": {
        "epochs": 5,
        "batch_size": 256,
        "learning_rate": 0.02,
        "distortion": 0.5,
        "label_smoothing": 0.0,
        "dropout": 0.0,
    },
    "long": {
        "epochs": 30,
        "batch_size": 128,
        "learning_rate": 0.02,
        "distortion": 1.0,
        "label_smoothing": 0.05,
        "dropout": 0.25,
    },
    # Few rows make few steps an epoch.
    "small": {
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.05,
        "distortion": 0.5,
        "label_smoothing": 0.05,
        "dropout": 0.0,
    },
}


class MnistSettings(Settings):
    """The built-in task's own settings."""

    recipe: Literal["quick", "short", "long", "small"] | None = None
    """preset of epochs, batch size, learning rate and more [short, or small]"""
    distortion: float | None = Field(default=None, ge=0, le=4)
    """strength of random distortions [of the recipe]"""
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    """label smoothing, a share [of the recipe]"""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """dropout rate of the last hidden layer [of the recipe]"""


class MnistSum(Task):
    """The digit of an image of MNIST, and its sum with a number 0..9."""

    name = "mnistsum"
    inputs: ClassVar = {"image": Images(SIDE, SIDE), "number": Integers(NUMBERS)}
    augmented = frozenset({"number"})
    labels: ClassVar = {"digit": Integers(DIGITS, names=("digit", "label"), flag="label_column")}
    outputs = pa.schema(
        {
            "pred_digit": pa.int8(),
            "digit_prob": pa.float32(),
            "pred_sum": pa.int8(),
            "sum_prob": pa.float32(),
            "consistent": pa.bool_(),  # pred_sum == pred_digit + number
            "digit_probs": pa.list_(pa.float32()),
            "sum_probs": pa.list_(pa.float32()),
        }
    )
    Settings = MnistSettings
    data_names: ClassVar[Mapping[str, str]] = {
        "auto": "full MNIST if it is found or can be downloaded, else the bundled sample",
        "sample": "5,000 images",
        "mnist": "never the sample; a folder of its files is taken, too",
    }

    def network(self) -> "nn.Module":
        from mnistsum_ray.mnist.network import TwoHeadCNN

        return TwoHeadCNN(self.settings.dropout or 0.0)

    def optimizer(self, network: Any, weight_decay: float, *, bf16: bool) -> "Optimizer":
        from mnistsum_ray.mnist.optimizer import MuonAdamW

        return MuonAdamW(network, weight_decay, bf16=bf16)

    def defaults(self, train_rows: int) -> dict[str, Any]:
        recipe = self.settings.recipe or ("small" if train_rows < FEW_ROWS else "short")
        return {"recipe": recipe, **_RECIPES[recipe]}

    def named_data(self, data: str) -> NamedData | None:
        return datasets.find(data)

    def augment(self, batch: Arrays, draws: RowRandom) -> Arrays:
        """Add a number to each row and, where images are distorted, the matrix for that."""
        batch = batch | {"number": draws.whole(1, NUMBERS)}
        if self.settings.distortion:
            from mnistsum_ray.mnist.network import affine_matrices

            # In -1..1. The images are distorted on the device, by the network.
            batch["affine"] = affine_matrices(draws.uniform(4, 6) * 2 - 1, self.settings.distortion)
        return batch

    def loss(self, outputs: "tuple[Tensor, Tensor]", batch: Batch) -> "Tensor":
        """Mean of the heads' cross-entropies, in nats; its gradient is that of smoothed labels.

        Both heads are smoothed (Szegedy et al., "Rethinking the Inception Architecture", 2016): the
        sum head reads the digit logits, and its unsmoothed loss would push them up without bound.
        """
        import torch
        import torch.nn.functional as F

        true_classes = (batch["digit"], batch["digit"] + batch["number"])
        exact, smooth = [], []
        for logits, truth in zip(outputs, true_classes, strict=True):
            logarithms = F.log_softmax(logits, dim=1)
            exact.append(F.nll_loss(logarithms, truth, reduction="none"))
            smooth.append(logarithms.sum(1) / -logits.shape[1])
        loss = torch.stack(exact).mean(0)
        if not self.settings.label_smoothing:
            return loss
        smoothed = torch.lerp(loss, torch.stack(smooth).mean(0), self.settings.label_smoothing)
        # The value of the exact loss, and the gradient of the smoothed one: what is added is 0.
        return loss.detach() + (smoothed - smoothed.detach())

    def evaluate(self, network: Any, outputs: "Tensor", batch: Batch) -> "dict[str, Tensor]":
        """Loss and right answers of each row with all numbers; `outputs` are digit logits."""
        import torch
        import torch.nn.functional as F

        from mnistsum_ray.mnist.analysis import with_all_numbers

        losses, right = [], {}
        for head, logits, truth in with_all_numbers(network, batch, outputs):
            loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
            losses.append(loss.view(truth.shape).mean(1))
            is_right = (logits.argmax(2) == truth).expand(-1, NUMBERS)  # the digit is for all pairs
            right[f"{head}_accuracy"] = is_right.sum(1)
        pairs = torch.full_like(batch["digit"], NUMBERS)
        return {"pairs": pairs, "loss": torch.stack(losses).mean(0), **right}

    def reduce_metrics(self, rows: int, sums: Mapping[str, float]) -> dict[str, float]:
        """Means of the loss over rows, and of accuracies over pairs; a scored row is one pair."""
        pairs = int(sums.get("pairs", rows))
        means = {name: total / pairs for name, total in sums.items()}
        if "pairs" in sums:
            means |= {"pairs": pairs, "loss": sums["loss"] / rows}
        return means

    def predict(self, outputs: "tuple[Tensor, Tensor]", batch: Batch) -> "dict[str, Tensor]":
        found = {}
        for head, logits in zip(HEADS, outputs, strict=True):
            probabilities = logits.softmax(1)
            probability, answer = probabilities.max(1)
            found[f"pred_{head}"] = answer.char()  # int8
            found[f"{head}_prob"] = probability
            found[f"{head}_probs"] = probabilities
        found["consistent"] = found["pred_sum"] == found["pred_digit"] + batch["number"]
        return found

    def row_metrics(self, predicted: "dict[str, Tensor]", batch: Batch) -> "dict[str, Tensor]":
        return {
            "digit_accuracy": predicted["pred_digit"] == batch["digit"],
            "sum_accuracy": predicted["pred_sum"] == batch["digit"] + batch["number"],
        }

    def calibrate(self, network: Any, validation: Evaluated) -> dict[str, Any]:
        """Fit a temperature for each head, and fold it into the weights."""
        from mnistsum_ray.mnist.analysis import fit_temperatures

        temperatures = fit_temperatures(network, validation)
        network.fold_temperatures(temperatures)
        return {"temperatures_in_weights": temperatures}

    def finish(self, network: Any, validation: Evaluated, test: Evaluated) -> Findings:
        from mnistsum_ray.mnist.analysis import finish

        return finish(network, test)

    def count(self, predicted: Arrays, batch: Arrays) -> dict[str, Any]:
        return report.count(predicted, batch)

    def describe(self, counts: Mapping[str, Any]) -> Findings:
        return report.describe(counts)
