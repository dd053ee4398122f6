"""What a model answers on rows whose digit is known, each with all ten numbers: where it is wrong, and how sure it is. No Ray."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.model import DIGITS, TwoHeadCNN, prepare_images
from mnistsum_ray.pairs import NUMBERS, Rows

MISTAKES: Final = 24
"""The most confident ones, of as many images, are kept to be looked at."""

_ROWS_AT_ONCE: Final = 256


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
class Examination:
    """The counts over all rows, and the mistakes of which the model was surest."""

    confusion: list[list[int]]
    """Rows with digit d that were taken for digit p: [d][p]."""
    sums_right: list[list[int]]
    """Rows with digit d whose sum with number k was right: [d][k]."""
    mistakes: list[Mistake]
    """One an image, the surest first: by the digit's probability, or the sum's where just that is wrong."""

    def as_json(self) -> dict[str, Any]:
        """What manifest.json says under `examination`."""
        return asdict(self)


@torch.no_grad()
def examine(
    model: TwoHeadCNN,
    rows_of: Callable[[Rows], dict[str, np.ndarray]],
    row_ids: Rows,
    autocast: AbstractContextManager[object],
    seen: Callable[[int], None] = lambda _: None,
) -> Examination:
    """Have the model answer every image with every number.

    Args:
        model: in evaluation mode, on any device.
        rows_of: gives of some row ids int64[m] `image` uint8[m, 28, 28] and `digit` int64[m] in 0..9.
        row_ids: int64[n], which to ask for.
        autocast: in which precision; entered once a batch.
        seen: is told of so many more rows, batch by batch.
    """
    device = next(model.parameters()).device
    confusion = np.zeros((DIGITS, DIGITS), np.int64)
    sums_right = np.zeros((DIGITS, NUMBERS), np.int64)
    mistakes: list[Mistake] = []
    for start in range(0, len(row_ids), _ROWS_AT_ONCE):
        rows = rows_of(row_ids[start : start + _ROWS_AT_ONCE])
        with autocast:
            digit_scores = model.digit_scores(prepare_images(torch.from_numpy(rows["image"]).to(device)))
        # As metrics.Tally does it, so that the two agree.
        digit_scores = digit_scores.float()
        digit_prob, pred_digit = _surest(digit_scores)
        sum_prob, pred_sum = _surest(model.sum_scores_of_all_numbers(digit_scores).float())
        digit = rows["digit"]
        sum_is_right = pred_sum == digit[:, None] + np.arange(NUMBERS)
        np.add.at(confusion, (digit, pred_digit), 1)
        np.add.at(sums_right, digit, sum_is_right)
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
        seen(len(rows["digit"]))
    mistakes.sort(key=_sureness, reverse=True)
    return Examination(confusion.tolist(), sums_right.tolist(), mistakes[:MISTAKES])


def _surest(scores: Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Scores [..., n] to the largest probability and its place, [...] each."""
    best = scores.softmax(-1).max(-1)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()


def _sureness(mistake: Mistake) -> float:
    # Since its lesson the sum head is sure of any sum; how sure the model was of a wrong digit, only the digit head tells.
    return mistake.digit_prob if mistake.pred_digit != mistake.digit else mistake.sum_prob
