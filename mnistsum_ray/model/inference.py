"""Inference: the fastest forward pass on a device, batched prediction, and predictions for columns of a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.device import array_to_device, disable_tf32, tune_malloc
from mnistsum_ray.model.heads import HEADS, PREDICTION_FIELDS, PROBABILITY_FIELDS, SUM
from mnistsum_ray.model.int8 import int8_digit_scores
from mnistsum_ray.model.metrics import probability_losses
from mnistsum_ray.model.network import Network, Scores, TwoHeadCNN, make_network, prepare_images, split_views

CPU_BATCH: Final = 256
"""Rows of a forward pass on CPUs: 3 to 7 % faster than 64 in `jobs/score.py` on two cores, and as fast as more."""
GPU_BATCH: Final = 2048

Numbers = npt.NDArray[np.int64]

Forward = Callable[[Tensor, Tensor], Scores]
"""Pixels uint8[n, 28, 28] and numbers int64[n] to scores by head, [n, classes] each."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of n rows."""

    values: Mapping[str, npt.NDArray[Any]]
    """[n] each, by name: of each head `pred_<head>`, the most likely class, of `Head.type`, and `<head>_prob` float32, its
    probability; with labels also `<head>_nll` and `<head>_brier`, see `probability_losses`: float32, 0 for rows without one.
    Where they are asked for, also `<head>_probs` float32[n, classes], the probabilities of all classes."""

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        """The arrays of `values` by their names, and the most likely classes as `<head>` alone: `digit`, `sum`."""
        values = vars(self).get("values", {})  # none yet where a copy is made
        for key in (f"pred_{name}", name):
            if key in values:
                return values[key]  # type: ignore[no-any-return]
        raise AttributeError(f"predictions have no {name!r}")

    def columns(self, numbers: Numbers) -> list[npt.NDArray[Any]]:
        """Values of PREDICTION_FIELDS, [n] each; `numbers` are those of the rows."""
        consistent = self.sum == SUM.target(self.digit, numbers)
        return [*(self.values[name] for name in PREDICTION_FIELDS.names[:-1]), consistent]

    def to_arrow(self, numbers: Numbers, missing: npt.NDArray[np.bool_] | None = None) -> dict[str, pa.Array]:
        """Columns by their names: PREDICTION_FIELDS, and PROBABILITY_FIELDS where they were asked for; null in `missing` rows."""
        columns = zip(PREDICTION_FIELDS, self.columns(numbers), strict=True)
        arrays = {field.name: pa.array(values, field.type, mask=missing) for field, values in columns}
        null = None if missing is None else pa.array(missing)
        for field in PROBABILITY_FIELDS:
            if field.name in self.values:
                flat = pa.array(self.values[field.name].reshape(-1))
                arrays[field.name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type, mask=null)
        return arrays

    def slice(self, start: int, end: int) -> "Predictions":
        """Predictions of rows start..end-1."""
        return Predictions({name: values[start:end] for name, values in self.values.items()})


def make_forward(model: Network, device: torch.device, precision: str, int8_maxima: Sequence[float] | None) -> Forward:
    """The forward pass on this device with precision fp32, bf16 or int8, which needs the maxima of its calibration."""
    int8_scores = None
    if precision == "int8" and int8_maxima and isinstance(model, TwoHeadCNN):
        int8_scores = int8_digit_scores(model, int8_maxima)

    def forward(images: Tensor, numbers: Tensor) -> Scores:
        if int8_scores:
            digit_scores = int8_scores(images)
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                digit_scores = model.digit_scores(prepare_images(images))
        # The sum head, a thousandth of the work, runs in float32, as in the evaluation during training.
        return model.scores(digit_scores.float(), numbers)

    return forward


class Predictor:
    """The network on one device. A process must have only one Predictor, which changes process-wide settings of PyTorch."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        device: torch.device,
        precision: str,
        batch_size: int | None,
        int8_maxima: Sequence[float] | None = None,
    ) -> None:
        if device.type == "cpu":
            tune_malloc()
            torch.set_num_threads(1)  # one process a core is faster than several threads, which wait for each other
        disable_tf32()
        self._device = device
        model = make_network()
        model.load_state_dict(weights)
        model.eval().to(device)
        self._forward = make_forward(model, device, precision, int8_maxima)
        self._batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        # The first pass builds and loads kernels. A device that does not work, or a batch too large for its memory, fails here.
        self.predict(np.zeros((self._batch_size, SIDE, SIDE), np.uint8), np.zeros(self._batch_size, np.int64))

    def predict(self, images: Pixels, numbers: Numbers, labels: Numbers | None = None, probs: bool = False) -> Predictions:
        """Predict images uint8[n, 28, 28] with numbers int64[n].

        If true digits are given, int64[n] and -1 where unknown, the predictions have losses; with `probs` they have the
        probabilities of all classes.
        """
        return _predict(self._forward, self._device, self._batch_size, images, numbers, labels, probs)


def predict_pairs(model: Network, images: Pixels, numbers: Numbers, batch_size: int, probs: bool = False) -> Predictions:
    """Predict uint8[n, 28, 28] with numbers int64[n], in float32 on the model's device."""
    device = next(model.parameters()).device
    return _predict(make_forward(model, device, "fp32", None), device, batch_size, images, numbers, None, probs)


@torch.inference_mode()
def _predict(
    forward: Forward, device: torch.device, batch_size: int, images: Pixels, numbers: Numbers, labels: Numbers | None, probs: bool
) -> Predictions:
    """Predict all rows, as `Predictor.predict`.

    The last batch is filled up with zeros. Kernels are chosen by the size of a batch, and each adds in its own order: in batches
    of one size, a row has the same bits whatever rows are scored with it.
    """
    scores: list[Scores] = []
    for start in range(0, max(1, len(images)), batch_size):  # torch.cat needs at least one batch
        batch = [array_to_device(values[start : start + batch_size], device) for values in (images, numbers)]
        missing = batch_size - len(batch[0])
        if missing:
            batch = [torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) for values in batch]
        scores.append(forward(*batch))
    found: dict[str, Tensor] = {}
    for head, batches in zip(HEADS, zip(*scores, strict=True), strict=True):
        logits = torch.cat(batches)[: len(images)]
        probabilities = logits.softmax(1)
        found[f"{head.name}_prob"], found[f"pred_{head.name}"] = probabilities.max(1)
        if probs:
            found[f"{head.name}_probs"] = probabilities
        if labels is not None:
            classes = torch.tensor(head.target(np.maximum(labels, 0), numbers), device=device)
            known = torch.tensor(labels >= 0, device=device)
            nll, brier = probability_losses(logits, classes)
            found[f"{head.name}_nll"], found[f"{head.name}_brier"] = nll * known, brier * known
    # In one copy from the device; classes are exact in float32.
    flat = torch.cat([values.float().flatten() for values in found.values()]).cpu()
    if not flat.isfinite().all():
        raise RunError("the model's scores are infinite or NaN for some image: its weights are too large; train again")
    arrays = [values.numpy() for values in split_views(flat, [values.shape for values in found.values()])]
    types = {f"pred_{head.name}": head.type.to_pandas_dtype() for head in HEADS}
    named = zip(found, arrays, strict=True)
    return Predictions({name: array.astype(types.get(name, np.float32), copy=False) for name, array in named})
