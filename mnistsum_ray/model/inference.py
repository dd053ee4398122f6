"""Inference: batched prediction on a device, and predictions as columns of a table."""

from collections.abc import Mapping
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
from mnistsum_ray.model.network import Network, Scores, make_network, prepare_images

CPU_BATCH: Final = 256
"""Rows of a forward pass on CPUs: 3 to 7 % faster than 64 on two cores, and as fast as more."""
GPU_BATCH: Final = 2048

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Predictions of n rows."""

    values: Mapping[str, npt.NDArray[Any]]
    """[n] each, by name: `pred_<head>`, `<head>_prob` float32 and, where asked for, `<head>_probs`
    float32[n, classes]: the most likely class, its probability, and those of all classes."""

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        """Arrays of `values` by name, and the most likely classes as `<head>` alone."""
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
        """Columns by name, with probabilities where they were asked for; null in `missing` rows."""
        columns = zip(PREDICTION_FIELDS, self.columns(numbers), strict=True)
        arrays = {field.name: pa.array(values, field.type, mask=missing) for field, values in columns}
        null = None if missing is None else pa.array(missing)
        for field in PROBABILITY_FIELDS:
            if field.name in self.values:
                rows, classes = self.values[field.name].shape
                offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * classes)
                flat = pa.array(self.values[field.name].reshape(-1))
                arrays[field.name] = pa.ListArray.from_arrays(offsets, flat, type=field.type, mask=null)
        return arrays

    def slice(self, start: int, end: int) -> "Predictions":
        """Predictions of rows start..end-1."""
        return Predictions({name: values[start:end] for name, values in self.values.items()})


class Predictor:
    """The network on one device; a process has one, which changes settings of PyTorch for all."""

    def __init__(self, weights: dict[str, Tensor], device: torch.device, precision: str, batch_size: int | None) -> None:
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

    def predict(self, images: Pixels, numbers: Numbers, probs: bool = False) -> Predictions:
        """As `predict_pairs`."""
        return predict_pairs(self._model, images, numbers, self._batch_size, probs, self._bf16)


@torch.inference_mode()
def predict_pairs(
    model: Network, images: Pixels, numbers: Numbers, batch_size: int, probs: bool = False, bf16: bool = False
) -> Predictions:
    """Predict uint8[n, 28, 28] with numbers int64[n] on the model's device; with `probs` of all classes.

    The last batch is filled up with zeros: kernels are chosen by the size of a batch, and a row has
    the same bits whatever rows are scored with it.
    """
    device = next(model.parameters()).device
    scores: list[Scores] = []
    for start in range(0, max(1, len(images)), batch_size):  # torch.cat needs at least one batch
        rows = slice(start, start + batch_size)
        batch = [array_to_device(values[rows], device) for values in (images, numbers)]
        missing = batch_size - len(batch[0])
        if missing:
            zeros = [values.new_zeros(missing, *values.shape[1:]) for values in batch]
            batch = [torch.cat(parts) for parts in zip(batch, zeros, strict=True)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            digit_scores = model.digit_scores(prepare_images(batch[0]))
        # The other heads, a thousandth of the work, run in float32, as in the evaluation.
        scores.append(model.scores(digit_scores.float(), batch[1]))
    found: dict[str, npt.NDArray[Any]] = {}
    for head, batches in zip(HEADS, zip(*scores, strict=True), strict=True):
        probabilities = torch.cat(batches)[: len(images)].softmax(1)
        probability, answer = probabilities.max(1)
        found[f"{head.name}_prob"] = probability.cpu().numpy()
        found[f"pred_{head.name}"] = answer.cpu().numpy().astype(head.type.to_pandas_dtype())
        if probs:
            found[f"{head.name}_probs"] = probabilities.cpu().numpy()
        if not np.isfinite(found[f"{head.name}_prob"]).all():
            raise RunError("the model's scores are infinite or NaN for some image: its weights are too large; train again")
    return Predictions(found)
