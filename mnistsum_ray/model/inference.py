"""Inference: batched prediction on a device, and predictions as columns of a table."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mnistsum_ray.data.images import SIDE, Numbers, Pixels
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import array_to_device, disable_tf32, tune_malloc
from mnistsum_ray.model.heads import HEADS, PREDICTION_FIELDS, PROBABILITY_FIELDS, SUM
from mnistsum_ray.model.network import Logits, TwoHeadCNN, compute_digit_logits, make_network

CPU_BATCH: Final = 256
"""Rows of a forward pass on CPUs: 3 to 7 % faster than 64 on two cores, and as fast as more."""
GPU_BATCH: Final = 2048

Predictions = dict[str, npt.NDArray[Any]]
"""Arrays of n rows: by name `pred_<head>`, the most likely class, and `<head>_prob`, its
probability float32[n]; where asked for also `<head>_probs`, of all classes float32[n, classes]."""


def append_predictions(
    table: pa.Table, predictions: Predictions, numbers: Numbers, reasons: Mapping[int, str]
) -> pa.Table:
    """The table of these rows, and after its columns those that scoring adds.

    `numbers` are the rows' own; `reasons` say of rows why they cannot be scored: their predictions
    are null.
    """
    reason_column = pa.array([reasons.get(row) for row in range(table.num_rows)], pa.string())
    is_bad = reason_column.is_valid()
    mask = is_bad.to_numpy(zero_copy_only=False)
    consistent = predictions["pred_sum"] == SUM.target(predictions["pred_digit"], numbers)
    columns = {"consistent": consistent, **predictions}
    for field in PREDICTION_FIELDS:
        table = table.append_column(field, pa.array(columns[field.name], field.type, mask=mask))
    for field in PROBABILITY_FIELDS:
        if field.name in columns:
            rows, classes = columns[field.name].shape
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * classes)
            flat = pa.array(columns[field.name].reshape(-1))
            lists = pa.ListArray.from_arrays(offsets, flat, type=field.type, mask=is_bad)
            table = table.append_column(field, lists)
    return table.append_column("reason", reason_column)


class Predictor:
    """The network on one device. PyTorch's settings change with it: a process has one."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        device: torch.device,
        precision: str,
        batch_size: int | None,
    ) -> None:
        if device.type == "cpu":
            tune_malloc()
            # One process a core is faster than several threads, which wait for each other.
            torch.set_num_threads(1)
        disable_tf32()
        self._model = make_network()
        self._model.load_state_dict(weights)
        self._model.eval().to(device)
        self._bf16 = precision == "bf16"
        self._batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        # A device that does not work, or a batch too large for its memory, fails here.
        images = np.zeros((self._batch_size, SIDE, SIDE), np.uint8)
        self.predict(images, np.zeros(self._batch_size, np.int64))

    def predict(self, images: Pixels, numbers: Numbers, probabilities: bool = False) -> Predictions:
        size, bf16 = self._batch_size, self._bf16
        return predict_pairs(self._model, images, numbers, size, probabilities, bf16)


@torch.inference_mode()
def predict_pairs(
    model: TwoHeadCNN,
    images: Pixels,
    numbers: Numbers,
    batch_size: int,
    probabilities: bool = False,
    bf16: bool = False,
) -> Predictions:
    """Predict uint8[n, 28, 28] with numbers int64[n]; with `probabilities` all probabilities too.

    The last batch is filled up with zeros: kernels are chosen by the size of a batch, so a row has
    the same bits whatever rows are scored with it.
    """
    device = next(model.parameters()).device
    logits_of_batches: list[Logits] = []
    for start in range(0, max(1, len(images)), batch_size):  # torch.cat needs at least one batch
        rows = slice(start, start + batch_size)
        batch = [array_to_device(values[rows], device) for values in (images, numbers)]
        missing = batch_size - len(batch[0])
        if missing:
            zeros = [values.new_zeros(missing, *values.shape[1:]) for values in batch]
            batch = [torch.cat(parts) for parts in zip(batch, zeros, strict=True)]
        digit_logits = compute_digit_logits(model, batch[0], bf16=bf16)
        # The other heads, a thousandth of the work, run in float32, as in the evaluation.
        logits_of_batches.append(model.logits(digit_logits.float(), batch[1]))
    found: Predictions = {}
    for index, head in enumerate(HEADS):
        logits = torch.cat([of_batch[index] for of_batch in logits_of_batches])[: len(images)]
        of_classes = logits.softmax(1)
        probability, answer = of_classes.max(1)
        found[f"{head.name}_prob"] = probability.cpu().numpy()
        found[f"pred_{head.name}"] = answer.cpu().numpy().astype(np.int8)
        if probabilities:
            found[f"{head.name}_probs"] = of_classes.cpu().numpy()
        if not np.isfinite(found[f"{head.name}_prob"]).all():
            raise RunError("the model's scores are infinite or NaN for some image; train again")
    return found
