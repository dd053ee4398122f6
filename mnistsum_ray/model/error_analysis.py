"""What a model answers on rows whose digit is known, each with all ten numbers: where it is wrong, and how sure it is. No Ray."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.data.sampling import NUMBERS, RowIds
from mnistsum_ray.model.calibration import HEADS, Reliability, Temperatures, auroc, fit_temperature
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.network import DIGITS, TwoHeadCNN, prepare_images

MISTAKES: Final = 24
"""The most confident ones, of as many images, are kept to be looked at."""

TEMPERATURE_ROWS: Final = 5_000
"""Validation rows, at most, that the temperatures are fitted on."""

_ROWS_AT_ONCE: Final = 256

RowsOf = Callable[[RowIds], dict[str, np.ndarray]]
"""Gives of some row ids int64[m] `image` uint8[m, 28, 28] and `digit` int64[m] in 0..9."""


@dataclass(frozen=True)
class Mistake:
    """One image with one number, and an answer that is wrong."""

    row_id: int
    """The row's place in its source."""
    digit: int
    number: int
    pred_digit: int
    digit_prob: float
    pred_sum: int
    sum_prob: float


@dataclass(frozen=True)
class ErrorAnalysis:
    """The counts over all rows, and the mistakes of which the model was surest."""

    confusion: list[list[int]]
    """Rows with digit d that were taken for digit p: [d][p]."""
    sums_right: list[list[int]]
    """Rows with digit d whose sum with number k was right: [d][k]."""
    mistakes: list[Mistake]
    """One an image, the surest first: by the digit's probability, or the sum's where just that is wrong."""
    consistent: float
    """Share of the pairs whose sum is the predicted digit plus the number."""
    probabilities: dict[str, dict[str, Any]]
    """By head: `nll`, `brier`, `ece` and `auroc` (of right answers beside wrong ones), and the `reliability` they come from."""

    def as_json(self) -> dict[str, Any]:
        """What manifest.json says under `examination`."""
        return asdict(self)

    def probability_metrics(self) -> dict[str, Any]:
        """What model.json says under `probabilities`: `consistent`, and by head `nll`, `brier`, `ece`, `auroc`."""
        heads = {
            head: {name: value for name, value in of.items() if name != "reliability"} for head, of in self.probabilities.items()
        }
        return {"consistent": self.consistent, **heads}

    def reliability(self) -> dict[str, Reliability]:
        """By head."""
        return {head: Reliability.from_json(of["reliability"]) for head, of in self.probabilities.items()}


@torch.no_grad()
def fit_temperatures(
    model: TwoHeadCNN, rows_of: RowsOf, row_ids: RowIds, autocast: AbstractContextManager[object]
) -> Temperatures:
    """The temperature of each head at which the truth of these rows is likeliest; arguments as for `analyse_errors`."""
    digits, digit_scores, sum_scores = [], [], []
    for rows, of_digits, of_sums in _scores(model, rows_of, row_ids, autocast):
        digits.append(rows["digit"])
        digit_scores.append(of_digits.cpu().numpy())
        sum_scores.append(of_sums.flatten(0, 1).cpu().numpy())
    truth = np.concatenate(digits)
    sums = (truth[:, None] + np.arange(NUMBERS)).ravel()
    return Temperatures(
        digit=fit_temperature(np.concatenate(digit_scores), truth), sum=fit_temperature(np.concatenate(sum_scores), sums)
    )


@torch.no_grad()
def analyse_errors(
    model: TwoHeadCNN,
    rows_of: RowsOf,
    row_ids: RowIds,
    autocast: AbstractContextManager[object],
    seen: Callable[[int], None] = lambda _: None,
) -> ErrorAnalysis:
    """Have the model answer every image with every number.

    Args:
        model: in evaluation mode, on any device; its temperatures are used.
        rows_of: gives images and digits.
        row_ids: int64[n], which to ask for.
        autocast: in which precision; entered once a batch.
        seen: called with the number of rows done since the last call.
    """
    confusion = np.zeros((DIGITS, DIGITS), np.int64)
    sums_right = np.zeros((DIGITS, NUMBERS), np.int64)
    consistent = 0
    mistakes: list[Mistake] = []
    heads = {head: _Head() for head in HEADS}
    start = 0
    for rows, digit_scores, sum_scores in _scores(model, rows_of, row_ids, autocast):
        digit = rows["digit"]
        sums = digit[:, None] + np.arange(NUMBERS)
        digit_prob, pred_digit = heads["digit"].add(digit_scores / model.temperatures.digit, digit)
        sum_prob, pred_sum = heads["sum"].add(sum_scores.flatten(0, 1) / model.temperatures.sum, sums.ravel())
        sum_prob, pred_sum = sum_prob.reshape(sums.shape), pred_sum.reshape(sums.shape)
        sum_is_right = pred_sum == sums
        np.add.at(confusion, (digit, pred_digit), 1)
        np.add.at(sums_right, digit, sum_is_right)
        consistent += int((pred_sum == pred_digit[:, None] + np.arange(NUMBERS)).sum())
        numbers = np.where(sum_is_right, 0, sum_prob).argmax(1)  # the sum it was surest of among those that are wrong
        for row in np.flatnonzero((pred_digit != digit) | ~sum_is_right.all(1)):
            number = int(numbers[row])
            mistakes.append(
                Mistake(
                    row_id=int(row_ids[start + row]),
                    digit=int(digit[row]),
                    number=number,
                    pred_digit=int(pred_digit[row]),
                    digit_prob=round(float(digit_prob[row]), 6),
                    pred_sum=int(pred_sum[row, number]),
                    sum_prob=round(float(sum_prob[row, number]), 6),
                )
            )
        start += len(digit)
        seen(len(digit))
    mistakes.sort(key=_sureness, reverse=True)
    return ErrorAnalysis(
        confusion.tolist(),
        sums_right.tolist(),
        mistakes[:MISTAKES],
        consistent / (NUMBERS * max(1, start)),
        {name: head.metrics() for name, head in heads.items()},
    )


def _scores(
    model: TwoHeadCNN, rows_of: RowsOf, row_ids: RowIds, autocast: AbstractContextManager[object]
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """Rows, their digit scores float32[m, 10] and the sum scores with all numbers float32[m, 10, 19], batch by batch."""
    device = next(model.parameters()).device
    for start in range(0, len(row_ids), _ROWS_AT_ONCE):
        rows = rows_of(row_ids[start : start + _ROWS_AT_ONCE])
        with autocast:
            digit_scores = model.digit_scores(prepare_images(torch.from_numpy(rows["image"]).to(device)))
        # The sum head in float32, as metrics.Tally has it, so that the two agree.
        digit_scores = digit_scores.float()
        yield rows, digit_scores, model.sum_scores_of_all_numbers(digit_scores).float()


class _Head:
    """Adds up how well the probabilities of one head describe how often it is right."""

    def __init__(self) -> None:
        self._reliability = Reliability()
        self._probability: list[npt.NDArray[np.float32]] = []
        self._right: list[npt.NDArray[np.bool_]] = []

    def add(self, scores: Tensor, labels: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Count scores [n, classes] and true classes [n]; the probability of each answer float32[n], and the answer int64[n]."""
        best = scores.softmax(1).max(1)
        probability, answer = best.values.cpu().numpy(), best.indices.cpu().numpy()
        nll, brier = probability_losses(scores, torch.from_numpy(labels).to(scores.device))
        right = answer == labels
        self._reliability.add(Reliability.of(probability, right, nll.cpu().numpy(), brier.cpu().numpy()))
        self._probability.append(probability)
        self._right.append(right)
        return probability, answer

    def metrics(self) -> dict[str, Any]:
        probability, right = np.concatenate(self._probability), np.concatenate(self._right)
        return self._reliability.metrics() | {"auroc": auroc(probability, right), "reliability": self._reliability.as_json()}


def _sureness(mistake: Mistake) -> float:
    return mistake.digit_prob if mistake.pred_digit != mistake.digit else mistake.sum_prob
