"""The model on rows: two answers a row, each with its probability. Nothing of Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.data.decoding import SIDE, Pixels
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.device import disable_tf32, tune_malloc
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.network import DIGITS, SUMS, TwoHeadCNN, mkldnn_digit_scores, prepare_images
from mnistsum_ray.model.quantization import int8_forward

CPU_BATCH: Final = 256
"""In `jobs/score.py` on two cores 3 to 7 % faster than 64, and no slower than larger ones."""
GPU_BATCH: Final = 2048

_NO_TEMPERATURES: Final = Temperatures()


@dataclass(frozen=True)
class ProbabilityLosses:
    """How far the probabilities of n rows are from their labels, float32[n] each; 0 where a row has no label."""

    digit_nll: npt.NDArray[np.float32]
    digit_brier: npt.NDArray[np.float32]
    sum_nll: npt.NDArray[np.float32]
    sum_brier: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Predictions:
    """Of n rows: the likelier digit int8[n] and sum int8[n], and the probability float32[n] of each."""

    digit: npt.NDArray[np.int8]
    digit_prob: npt.NDArray[np.float32]
    sum: npt.NDArray[np.int8]
    sum_prob: npt.NDArray[np.float32]
    losses: ProbabilityLosses | None = None
    """Where labels were given."""

    def slice(self, start: int, end: int) -> "Predictions":
        """Those of rows start..end-1."""
        rows = slice(start, end)
        losses = self.losses and ProbabilityLosses(**{name: value[rows] for name, value in vars(self.losses).items()})
        return Predictions(self.digit[rows], self.digit_prob[rows], self.sum[rows], self.sum_prob[rows], losses)


def make_forward(
    model: TwoHeadCNN, device: torch.device, precision: str, int8_maxima: tuple[float, ...] | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The model's fastest way to predict with this device and precision: from pixels uint8[n, 28, 28] and numbers int64[n]."""
    if precision == "int8":
        assert int8_maxima is not None
        return int8_forward(model, int8_maxima)
    blocked = device.type == "cpu" and precision == "fp32" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    digit_scores_of = mkldnn_digit_scores(model) if blocked else model.digit_scores

    def forward(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            digit_scores = digit_scores_of(prepare_images(images))
        # The sum head, a thousandth of the work, in float32, as when a training evaluates (metrics.py).
        digit_scores = digit_scores.float()
        return digit_scores, model.sum_scores(digit_scores, numbers)

    return forward


class Predictor:
    """The network on one device. A process has one: it sets how the process computes."""

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
            torch.set_num_threads(1)  # one process a core gets more done than threads that wait for each other
        disable_tf32()
        self._device, self._temperatures = device, temperatures
        model = TwoHeadCNN()
        model.load_state_dict(weights)
        model.eval().to(device)
        self._forward = make_forward(model, device, precision, int8_maxima)
        self._batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        # The first pass builds and loads kernels; what cannot run at all is found out here.
        self.predict(np.zeros((self._batch_size, SIDE, SIDE), np.uint8), np.zeros(self._batch_size, np.int64))

    def predict(self, images: Pixels, numbers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None = None) -> Predictions:
        """Predict n rows.

        Args:
            images: uint8[n, 28, 28].
            numbers: int64[n] in 0..9.
            labels: int64[n], the true digits, -1 where unknown; with them, the predictions have their losses.
        """
        heads = _scores(self._forward, images, numbers, self._batch_size, self._device)
        return _predictions(heads, self._temperatures, numbers, labels)


def predict_pairs(model: TwoHeadCNN, images: Pixels, numbers: npt.NDArray[np.int64], batch_size: int) -> Predictions:
    """Those of uint8[n, 28, 28] and int64[n] in 0..9, with the model and its temperatures as they are, where it is."""

    def forward(image: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        scores: tuple[Tensor, Tensor] = model(prepare_images(image), number)
        return scores

    heads = _scores(forward, images, numbers, batch_size, next(model.parameters()).device)
    return _predictions(heads, model.temperatures, numbers, None)


@torch.inference_mode()
def _scores(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    images: Pixels,
    numbers: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The scores of both heads, float32 on the CPU: [n, 10] and [n, 19]."""
    heads: tuple[list[Tensor], list[Tensor]] = ([torch.empty(0, DIGITS)], [torch.empty(0, SUMS)])
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        image, number = (torch.from_numpy(values[rows]).to(device) for values in (images, numbers))
        for head, scores in zip(heads, forward(image, number), strict=True):
            head.append(scores.float().cpu())
    return torch.cat(heads[0]), torch.cat(heads[1])


def _predictions(
    heads: tuple[Tensor, Tensor],
    temperatures: Temperatures,
    numbers: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64] | None,
) -> Predictions:
    digit_scores, sum_scores = heads[0] / temperatures.digit, heads[1] / temperatures.sum
    (digit_prob, digit), (sum_prob, total) = (scores.softmax(1).max(1) for scores in (digit_scores, sum_scores))
    losses = None
    if labels is not None:
        known = torch.from_numpy(labels >= 0)
        truth = torch.from_numpy(np.maximum(labels, 0))
        found = (*probability_losses(digit_scores, truth), *probability_losses(sum_scores, truth + torch.from_numpy(numbers)))
        losses = ProbabilityLosses(*((values * known).numpy() for values in found))
    answers = digit.numpy().astype(np.int8), digit_prob.numpy(), total.numpy().astype(np.int8), sum_prob.numpy()
    return Predictions(*answers, losses)
