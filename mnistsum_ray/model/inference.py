"""Inference: the fastest forward pass on a device, and batched prediction."""

import threading
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.data.images import SIDE, Pixels
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.device import array_to_device, disable_tf32, tune_malloc
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.int8 import int8_digit_scores
from mnistsum_ray.model.network import Scores, TwoHeadCNN, mkldnn_digit_scores, prepare_images
from mnistsum_ray.model.predictions import Predictions

CPU_BATCH: Final = 256
"""In `jobs/score.py` on two cores 3 to 7 % faster than 64, and as fast as larger batches."""
GPU_BATCH: Final = 2048

_ROWS_ON_DEVICE: Final = 65_536
"""Rows that are copied to the device at once."""

_forward_lock = threading.Lock()
"""Threads of a process compute one after the other, so that the memory of the device holds the batch of one."""

_NO_TEMPERATURES: Final = Temperatures()

Forward = Callable[[Tensor, Tensor], Scores]
"""Pixels uint8[n, 28, 28] and numbers int64[n] to scores by head, [n, classes] each."""


def make_forward(model: TwoHeadCNN, device: torch.device, precision: str, int8_maxima: tuple[float, ...] | None) -> Forward:
    """The fastest forward pass for inference on this device with precision fp32, bf16 or int8."""
    digit_scores_of_pixels = _digit_scores_of_pixels(model, device, precision, int8_maxima)

    def forward(images: Tensor, numbers: Tensor) -> Scores:
        # The sum head, a thousandth of the work, runs in float32, as in the evaluation during training.
        return model.scores(digit_scores_of_pixels(images).float(), numbers)

    return forward


def _digit_scores_of_pixels(
    model: TwoHeadCNN, device: torch.device, precision: str, int8_maxima: tuple[float, ...] | None
) -> Callable[[Tensor], Tensor]:
    if precision == "int8":
        assert int8_maxima is not None
        return int8_digit_scores(model, int8_maxima)
    use_mkldnn = device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    digit_scores = mkldnn_digit_scores(model) if use_mkldnn else model.digit_scores

    def digit_scores_of_pixels(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return digit_scores(prepare_images(images))

    return digit_scores_of_pixels


class Predictor:
    """The network on one device. A process must have only one Predictor, which changes process-wide settings of PyTorch."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        device: torch.device,
        precision: str,
        batch_size: int | None,
        int8_maxima: tuple[float, ...] | None = None,
        temperatures: Temperatures = _NO_TEMPERATURES,
    ) -> None:
        if device.type == "cpu":
            tune_malloc()
            torch.set_num_threads(1)  # one process a core is faster than several threads, which wait for each other
        disable_tf32()
        self._device, self._temperatures = device, temperatures
        model = TwoHeadCNN()
        model.load_state_dict(weights)
        model.eval().to(device)
        self._forward = make_forward(model, device, precision, int8_maxima)
        self._batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        # The first pass builds and loads kernels. A device that does not work, or a batch too large for its memory, fails here.
        self.predict(np.zeros((self._batch_size, SIDE, SIDE), np.uint8), np.zeros(self._batch_size, np.int64))

    def predict(self, images: Pixels, numbers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None = None) -> Predictions:
        """Predict n rows.

        Args:
            images: uint8[n, 28, 28].
            numbers: int64[n] in 0..9.
            labels: true digits int64[n], -1 where unknown; if given, the predictions have losses.
        """
        scores = _batched_scores(self._forward, images, numbers, self._batch_size, self._device)
        return Predictions.from_scores(scores, self._temperatures, numbers, labels)


def predict_pairs(model: TwoHeadCNN, images: Pixels, numbers: npt.NDArray[np.int64], batch_size: int) -> Predictions:
    """Predict uint8[n, 28, 28] with int64[n] in 0..9, in the model's own precision and on its device."""

    def forward(images: Tensor, numbers: Tensor) -> Scores:
        scores: Scores = model(prepare_images(images), numbers)
        return scores

    scores = _batched_scores(forward, images, numbers, batch_size, next(model.parameters()).device)
    return Predictions.from_scores(scores, model.temperatures, numbers)


@torch.inference_mode()
def _batched_scores(
    forward: Forward, images: Pixels, numbers: npt.NDArray[np.int64], batch_size: int, device: torch.device
) -> Scores:
    """Scores of all rows by head, float32 on the device.

    The last batch is filled up with zeros. Kernels are chosen by the size of a batch, and each adds in its own order: in batches
    of one size, a row has the same bits whatever rows are scored with it.
    """
    # Each list begins with an empty batch, because torch.cat needs at least one.
    scores: list[Scores] = [tuple(torch.empty(0, head.classes, device=device) for head in HEADS)]
    slab_rows = batch_size * max(1, _ROWS_ON_DEVICE // batch_size)
    for start in range(0, len(images), slab_rows):
        slab = slice(start, start + slab_rows)
        on_device = [_fill_up(array_to_device(values[slab], device), batch_size) for values in (images, numbers)]
        with _forward_lock:
            scores += [forward(*batch) for batch in zip(*(torch.split(values, batch_size) for values in on_device), strict=True)]
    return tuple(torch.cat([batch.float() for batch in batches])[: len(images)] for batches in zip(*scores, strict=True))


def _fill_up(values: Tensor, batch_size: int) -> Tensor:
    """The rows, and zeros up to a multiple of the batch size."""
    missing = -len(values) % batch_size
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
