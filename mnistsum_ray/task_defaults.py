"""What a task predicts of its labels, learns and measures, unless it says otherwise.

A label of Integers or Classes gets a softmax and cross-entropy, one of Numbers the squared error.
The network returns an output for each label: a tensor if there is one label, else a dict by the
labels' names, or a tuple in their order.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mnistsum_ray.data.columns import Classes, Column, Integers, Numbers

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor


def default_outputs(labels: Mapping[str, Column]) -> pa.Schema:
    """Return the columns that scoring adds: `pred_LABEL`, and of classes `LABEL_prob`."""
    fields: list[tuple[str, pa.DataType]] = []
    for key, label in labels.items():
        if isinstance(label, Integers | Classes):
            kind = pa.string() if isinstance(label, Classes) else pa.int64()
            fields += [(f"pred_{key}", kind), (f"{key}_prob", pa.float32())]
        elif isinstance(label, Numbers):
            kind = pa.float32() if label.length is None else pa.list_(pa.float32())
            fields.append((f"pred_{key}", kind))
    return pa.schema(fields)


def default_loss(
    labels: Mapping[str, Column], outputs: Any, batch: "Mapping[str, Tensor]"
) -> "Tensor":
    """Return the mean over labels of each row's loss, float32[n]."""
    import torch
    import torch.nn.functional as F

    losses = []
    for key, output in _by_label(labels, outputs).items():
        if isinstance(labels[key], Numbers):
            squares = (output.reshape(batch[key].shape) - batch[key]).square()
            losses.append(squares.reshape(len(squares), -1).mean(1))
        else:
            losses.append(F.cross_entropy(output, batch[key], reduction="none"))
    return torch.stack(losses).mean(0)


def default_predictions(labels: Mapping[str, Column], outputs: Any) -> "dict[str, Tensor]":
    """Return the columns of `default_outputs`; a class is its number."""
    predicted = {}
    for key, output in _by_label(labels, outputs).items():
        label = labels[key]
        if isinstance(label, Numbers):
            predicted[f"pred_{key}"] = output.reshape(len(output), *label.shape)
        else:
            predicted[f"{key}_prob"], predicted[f"pred_{key}"] = output.softmax(1).max(1)
    return predicted


def default_row_metrics(
    labels: Mapping[str, Column],
    predicted: "Mapping[str, Tensor]",
    batch: "Mapping[str, Tensor]",
) -> "dict[str, Tensor]":
    """Return `accuracy` of classes and `absolute_error` of numbers, after the label if several."""
    found = {}
    for key, label in labels.items():
        prediction = predicted.get(f"pred_{key}")
        if prediction is None:  # a list, which scoring has only with `--probabilities`
            continue
        prefix = "" if len(labels) == 1 else f"{key}_"
        if isinstance(label, Numbers):
            errors = (prediction - batch[key]).abs()
            found[f"{prefix}absolute_error"] = errors.reshape(len(errors), -1).mean(1)
        else:
            found[f"{prefix}accuracy"] = prediction == batch[key]
    return found


def _by_label(labels: Mapping[str, Column], outputs: Any) -> "dict[str, Tensor]":
    if isinstance(outputs, dict):
        return {key: outputs[key] for key in labels}
    several = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return dict(zip(labels, several, strict=True))
