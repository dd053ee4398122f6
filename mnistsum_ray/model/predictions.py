"""Predictions of all heads with their probabilities, computed from scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.heads import HEADS, SUM
from mnistsum_ray.model.loss import probability_losses
from mnistsum_ray.model.network import Scores

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeadPredictions:
    """What one head predicts for n rows."""

    answer: npt.NDArray[np.int8]
    """Most likely class, int8[n]."""
    probability: Floats
    """Of that class, float32[n]."""
    nll: Floats | None = None
    """Negative log-likelihood of the true class in nats, float32[n]; 0 for rows without a label, None without labels."""
    brier: Floats | None = None
    """Brier score, likewise."""

    def slice(self, start: int, end: int) -> "HeadPredictions":
        """What it predicts for rows start..end-1."""
        return HeadPredictions(**{name: values if values is None else values[start:end] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Predictions:
    """Predictions of n rows."""

    heads: Mapping[str, HeadPredictions]
    """By the head's name."""

    @property
    def digit(self) -> npt.NDArray[np.int8]:
        """Most likely digit, int8[n]."""
        return self.heads["digit"].answer

    @property
    def digit_prob(self) -> Floats:
        """Its probability, float32[n]."""
        return self.heads["digit"].probability

    @property
    def sum(self) -> npt.NDArray[np.int8]:
        """Most likely sum, int8[n]."""
        return self.heads["sum"].answer

    @property
    def sum_prob(self) -> Floats:
        """Its probability, float32[n]."""
        return self.heads["sum"].probability

    def consistent(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """True for each row whose sum is its digit + number, bool[n]."""
        found: npt.NDArray[np.bool_] = self.sum == SUM.target(self.digit, numbers)
        return found

    def columns(self, numbers: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Values of PREDICTION_FIELDS, [n] each; `numbers` are those of the rows."""
        answers = [values for head in self.heads.values() for values in (head.answer, head.probability)]
        return [*answers, self.consistent(numbers)]

    @classmethod
    def from_scores(
        cls,
        scores: Scores,
        temperatures: Temperatures,
        numbers: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64] | None = None,
    ) -> "Predictions":
        """Predict n rows from their scores.

        Args:
            scores: logits float32[n, classes] by head, on any device, where all is computed.
            temperatures: divisors of the scores.
            numbers: int64[n] in 0..9.
            labels: true digits int64[n], -1 where unknown; if given, the predictions have losses.
        """
        columns: list[Tensor] = []
        for head, logits in zip(HEADS, scores, strict=True):
            logits = logits / vars(temperatures)[head.name]
            probability, answer = logits.softmax(1).max(1)
            columns += [answer, probability]
            if labels is not None:
                targets = torch.tensor(head.target(np.maximum(labels, 0), numbers), device=logits.device)
                known = torch.tensor(labels >= 0, device=logits.device)
                columns += [loss * known for loss in probability_losses(logits, targets)]
        values = torch.stack([column.float() for column in columns]).cpu().numpy()  # classes are exact in float32
        by_head = values.reshape(len(HEADS), len(columns) // len(HEADS), len(numbers))
        return cls(
            {
                head.name: HeadPredictions(answer.astype(np.int8), *others)
                for head, (answer, *others) in zip(HEADS, by_head, strict=True)
            }
        )

    def slice(self, start: int, end: int) -> "Predictions":
        """Predictions of rows start..end-1."""
        return Predictions({name: head.slice(start, end) for name, head in self.heads.items()})
