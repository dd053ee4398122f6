"""Error analysis of a trained model: confusion matrix, confident mistakes, and how reliable the probabilities are."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.calibration import Temperatures, fit_temperature
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.model.evaluation import PairScores
from mnistsum_ray.model.heads import DIGITS, HEADS
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.reliability import Reliability, auroc

MAX_MISTAKES: Final = 24
"""Most confident mistakes that are kept for the report, one an image."""

BATCH: Final = 256
"""Rows of a batch."""

Batches = Iterable[dict[str, np.ndarray]]
"""Rows in batches: `image` uint8[m, 28, 28], `digit` int64[m] in 0..9, and `row_id` int64[m]."""


@dataclass(frozen=True)
class Mistake:
    """One image with one number for which the model predicts a wrong digit or sum."""

    row_id: int
    """Row number in the data source."""
    digit: int
    number: int
    pred_digit: int
    digit_prob: float
    pred_sum: int
    sum_prob: float

    @property
    def confidence(self) -> float:
        """Probability of the wrong answer: of the digit where it is wrong, otherwise of the sum."""
        return self.digit_prob if self.pred_digit != self.digit else self.sum_prob


@dataclass(frozen=True)
class ErrorAnalysis:
    """Counts over all rows, and the most confident mistakes."""

    confusion: list[list[int]]
    """Rows by true digit d and predicted digit p: [d][p]."""
    sums_right: list[list[int]]
    """Rows with digit d whose sum with number k is predicted right: [d][k]."""
    mistakes: list[Mistake]
    """At most MAX_MISTAKES, one an image, the most confident first."""
    consistent: float
    """Share of the pairs whose predicted sum is the predicted digit plus the number."""
    probabilities: dict[str, dict[str, Any]]
    """By head: `nll` in nats, `brier`, `ece`, `auroc` of right against wrong answers, and the `reliability` behind them."""

    def as_json(self) -> dict[str, Any]:
        """The entry `error_analysis` of manifest.json."""
        return asdict(self)

    def probability_metrics(self) -> dict[str, Any]:
        """The entry `probabilities` of model.json: `consistent`, and by head `nll`, `brier`, `ece`, `auroc`."""
        heads = {
            head: {name: value for name, value in metrics.items() if name != "reliability"}
            for head, metrics in self.probabilities.items()
        }
        return {"consistent": self.consistent, **heads}

    def reliability(self) -> dict[str, Reliability]:
        """Reliability by head."""
        return {head: Reliability.from_json(metrics["reliability"]) for head, metrics in self.probabilities.items()}


@torch.no_grad()
def fit_temperatures(model: TwoHeadCNN, batches: Batches, autocast: AbstractContextManager[object]) -> Temperatures:
    """Fit the temperature of each head by maximum likelihood on these rows; arguments as for `analyse_errors`."""
    digits, digit_scores, sum_scores = [], [], []
    for rows, scores in _with_scores(model, batches, autocast):
        digits.append(rows["digit"])
        digit_scores.append(scores.digit.cpu().numpy())
        sum_scores.append(scores.sum.flatten(0, 1).cpu().numpy())
    true_digits = np.concatenate(digits)
    true_sums = (true_digits[:, None] + np.arange(NUMBERS)).ravel()
    return Temperatures(
        digit=fit_temperature(np.concatenate(digit_scores), true_digits),
        sum=fit_temperature(np.concatenate(sum_scores), true_sums),
    )


@torch.no_grad()
def analyse_errors(
    model: TwoHeadCNN,
    batches: Batches,
    autocast: AbstractContextManager[object],
    on_progress: Callable[[int], None] = lambda _: None,
) -> ErrorAnalysis:
    """Predict every image with every number and analyse the errors.

    Args:
        model: in evaluation mode, on any device; its temperatures are applied.
        batches: rows to analyse.
        autocast: precision of the convolutions; entered once a batch.
        on_progress: called with the number of rows done since the last call.
    """
    confusion = np.zeros((DIGITS, DIGITS), np.int64)
    sums_right = np.zeros((DIGITS, NUMBERS), np.int64)
    consistent = 0
    mistakes: list[Mistake] = []
    heads = {head.name: _HeadStatistics() for head in HEADS}
    count = 0
    for rows, scores in _with_scores(model, batches, autocast):
        digit = rows["digit"]
        sums = digit[:, None] + np.arange(NUMBERS)
        digit_prob, pred_digit = heads["digit"].add(scores.digit / model.temperatures.digit, digit)
        sum_prob, pred_sum = heads["sum"].add(scores.sum.flatten(0, 1) / model.temperatures.sum, sums.ravel())
        sum_prob, pred_sum = sum_prob.reshape(sums.shape), pred_sum.reshape(sums.shape)
        sum_is_right = pred_sum == sums
        np.add.at(confusion, (digit, pred_digit), 1)
        np.add.at(sums_right, digit, sum_is_right)
        consistent += int((pred_sum == pred_digit[:, None] + np.arange(NUMBERS)).sum())
        numbers = np.where(sum_is_right, 0, sum_prob).argmax(1)  # the number with the most confident wrong sum
        for row in np.flatnonzero((pred_digit != digit) | ~sum_is_right.all(1)):
            number = int(numbers[row])
            mistakes.append(
                Mistake(
                    row_id=int(rows["row_id"][row]),
                    digit=int(digit[row]),
                    number=number,
                    pred_digit=int(pred_digit[row]),
                    digit_prob=round(float(digit_prob[row]), 6),
                    pred_sum=int(pred_sum[row, number]),
                    sum_prob=round(float(sum_prob[row, number]), 6),
                )
            )
        count += len(digit)
        on_progress(len(digit))
    mistakes.sort(key=lambda mistake: mistake.confidence, reverse=True)
    return ErrorAnalysis(
        confusion.tolist(),
        sums_right.tolist(),
        mistakes[:MAX_MISTAKES],
        consistent / (NUMBERS * max(1, count)),
        {name: head.metrics() for name, head in heads.items()},
    )


def _with_scores(
    model: TwoHeadCNN, batches: Batches, autocast: AbstractContextManager[object]
) -> Iterator[tuple[dict[str, np.ndarray], PairScores]]:
    """The batches with their scores."""
    device = next(model.parameters()).device
    for rows in batches:
        with autocast:
            digit_scores = model.digit_scores(prepare_images(array_to_device(rows["image"], device)))
        yield rows, PairScores.from_digit_scores(model, digit_scores)


class _HeadStatistics:
    """Accumulates how reliable the probabilities of one head are."""

    def __init__(self) -> None:
        self._reliability = Reliability()
        self._probability: list[npt.NDArray[np.float32]] = []
        self._right: list[npt.NDArray[np.bool_]] = []

    def add(self, scores: Tensor, labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Add scores [n, classes] and true classes [n]; return the answers int64[n] after their probabilities float32[n]."""
        best = scores.softmax(1).max(1)
        probability, answer = best.values.cpu().numpy(), best.indices.cpu().numpy()
        nll, brier = probability_losses(scores, torch.from_numpy(labels).to(scores.device))
        right = answer == labels
        self._reliability.add(Reliability.from_predictions(probability, right, nll.cpu().numpy(), brier.cpu().numpy()))
        self._probability.append(probability)
        self._right.append(right)
        return probability, answer

    def metrics(self) -> dict[str, Any]:
        probability, right = np.concatenate(self._probability), np.concatenate(self._right)
        return self._reliability.metrics() | {"auroc": auroc(probability, right), "reliability": self._reliability.as_json()}
