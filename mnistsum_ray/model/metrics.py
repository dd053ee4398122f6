"""Metrics on rows whose digit is known: accuracies, loss, calibration, the worst mistakes.

Each image is paired with every number, and not with a random one: the sum accuracy then has no luck
in it. The convolutions, nearly all of the work, run once an image.

Temperatures calibrate the heads (Guo et al., "On Calibration of Modern Neural Networks", 2017): the
scores (logits) of a head are divided by its temperature before softmax.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.order import NUMBERS, check_row_counts, mix_ids
from mnistsum_ray.model.device import all_reduce_sum
from mnistsum_ray.model.heads import HEADS, SUM
from mnistsum_ray.model.network import Network, Scores

RELIABILITY_BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al. (2017)."""

MAX_MISTAKES: Final = 24
"""Most confident mistakes that are kept for the report, one an image."""

_PRIOR_DEVIATION: Final = 0.5
"""Of the prior on log(temperature), without which it falls without end if no row is wrong."""

_MAX_LOG_TEMPERATURE: Final = 1.5
_SEARCH_STEPS: Final = 25

LabelledRows = dict[str, Tensor]
"""Rows on the model's device: `image` uint8[n, 28, 28], `digit` and `row_id` int64[n]."""

Metrics = dict[str, float]
"""`rows`, `pairs`, `loss` (mean cross-entropy of the pairs and the heads, in nats),
`<head>_accuracy`, and `consistency`: share of the pairs whose predicted sum is the predicted digit
plus the number."""

ScoredRows = Iterable[tuple[LabelledRows, Scores]]
"""Batches with scores by head: float32[n, k, classes]; k is NUMBERS, or 1 of digits."""


@dataclass
class Reliability:
    """Predictions of a head in bins of equal width by the probability of the predicted class."""

    rows: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)
    probability: list[float] = field(default_factory=lambda: [0.0] * RELIABILITY_BINS)
    """Sum of the probabilities in each bin."""
    right: list[int] = field(default_factory=lambda: [0] * RELIABILITY_BINS)

    @classmethod
    def of(
        cls, probability: npt.NDArray[np.floating[Any]], right: npt.NDArray[np.bool_]
    ) -> "Reliability":
        """Count n rows: the probability of the predicted class, and whether it is right."""
        bins = (probability * RELIABILITY_BINS).astype(np.int64).clip(max=RELIABILITY_BINS - 1)
        rows = np.bincount(bins, minlength=RELIABILITY_BINS)
        sums = np.bincount(bins, probability.astype(np.float64), RELIABILITY_BINS)
        of_right = np.bincount(bins[right], minlength=RELIABILITY_BINS)
        return cls(rows.tolist(), sums.tolist(), of_right.tolist())

    def add(self, other: "Reliability") -> None:
        """Add the counts of other rows, in place."""
        for name, counts in vars(other).items():
            setattr(self, name, np.add(getattr(self, name), counts).tolist())

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean distance of probability and accuracy; None: no rows."""
        rows = sum(self.rows)
        gaps = np.abs(np.array(self.probability) - np.array(self.right))
        return float(gaps.sum() / rows) if rows else None

    def as_json(self) -> dict[str, Any]:
        """The error `ece`, and under `reliability` the counts behind it."""
        return {"ece": self.ece, "reliability": vars(self)}


@torch.no_grad()
def score_rows(
    model: Network, rows: Iterable[tuple[LabelledRows, Tensor]]
) -> Iterator[tuple[LabelledRows, Scores]]:
    """Batches with the scores of all heads, of batches with digit scores [n, 10] in any dtype."""
    for batch, digit_scores in rows:
        # The other heads, a thousandth of the work, run in float32.
        yield batch, model.scores_of_all_numbers(digit_scores.float())


def true_classes(digits: Tensor, scores: Scores) -> list[Tensor]:
    """True classes by head, int64[n, k], of digits int64[n] with scores as in `ScoredRows`."""
    numbers = torch.arange(NUMBERS, device=digits.device)
    classes = []
    for head, logits in zip(HEADS, scores, strict=True):
        target: Tensor = head.target(digits[:, None], numbers)
        classes.append(target.broadcast_to(logits.shape[:2]))
    return classes


class AnswerCounts:
    """Right answers and losses, summed on the device, and by `metrics` over the workers."""

    def __init__(self, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.confusion = zeros(DIGITS, DIGITS)
        """Rows by true digit d and predicted digit p: [d, p]."""
        self.right = zeros(len(HEADS))
        """Pairs that each head answers right."""
        self.consistent = zeros(1)
        """Pairs whose predicted sum is the predicted digit plus the number."""
        self._id_sum = zeros(1)
        self._losses = torch.zeros(len(HEADS), dtype=torch.float64, device=device)

    def add(self, batch: LabelledRows, scores: Scores) -> None:
        """Count one batch with its scores, as `score_rows` yields them."""
        digits = batch["digit"]
        answers = {}
        truths = true_classes(digits, scores)
        for index, head in enumerate(HEADS):
            logits, truth = scores[index], truths[index]
            answers[head.name] = logits.argmax(2)
            self.right[index] += (answers[head.name] == truth).expand(-1, NUMBERS).sum()
            loss = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum")
            self._losses[index] += loss / truth.size(1)
        cells = digits * DIGITS + answers["digit"].squeeze(1)
        self.confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))
        numbers = torch.arange(NUMBERS, device=digits.device)
        self.consistent += (answers["sum"] == SUM.target(answers["digit"], numbers)).sum()
        self._id_sum += mix_ids(batch["row_id"]).sum()

    def shares(self) -> Metrics:
        """`<head>_accuracy` and `consistency` over the rows that were added."""
        pairs = NUMBERS * int(self.confusion.sum())
        shares = {}
        for head, right in zip(HEADS, self.right.tolist(), strict=True):
            shares[f"{head.name}_accuracy"] = right / pairs
        return shares | {"consistency": int(self.consistent) / pairs}

    def metrics(self, expected_rows: int, expected_id_sum: int) -> Metrics:
        """Sum over the workers and divide. RowCountError: a row was not counted exactly once."""
        for counted in (self.confusion, self.right, self.consistent, self._id_sum, self._losses):
            counted.copy_(all_reduce_sum(counted))
        rows = int(self.confusion.sum())
        check_row_counts(rows, int(self._id_sum), expected_rows, expected_id_sum, "evaluation")
        loss = self._losses.mean().item() / rows
        return {"rows": rows, "pairs": rows * NUMBERS, "loss": loss} | self.shares()


def analyse_errors(
    scored: ScoredRows, device: torch.device, on_progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """The entry `error_analysis` of manifest.json: errors on rows, which are on the device.

    `confusion`: rows by true and predicted digit. `mistakes`: see `_mistakes`, the surest first.
    `consistent`: see Metrics. `probabilities`: `Reliability.as_json` by head.
    """
    counts = AnswerCounts(device)
    reliability = {head.name: Reliability() for head in HEADS}
    mistakes: list[dict[str, Any]] = []
    for batch, scores in scored:
        counts.add(batch, scores)
        truths = true_classes(batch["digit"], scores)
        for of_head, logits, truth in zip(reliability.values(), scores, truths, strict=True):
            probability, answer = (values.flatten().cpu() for values in logits.softmax(2).max(2))
            right = (answer == truth.flatten().cpu()).numpy()
            of_head.add(Reliability.of(probability.numpy(), right))
        mistakes += _mistakes(batch, scores)
        on_progress(len(batch["digit"]))
    return {
        "confusion": counts.confusion.tolist(),
        "mistakes": sorted(mistakes, key=itemgetter("confidence"), reverse=True)[:MAX_MISTAKES],
        "consistent": counts.shares()["consistency"],
        "probabilities": {name: of_head.as_json() for name, of_head in reliability.items()},
    }


def _mistakes(batch: LabelledRows, scores: Scores) -> Iterator[dict[str, Any]]:
    """The images with a wrong answer, each with the number whose wrong answer is the surest.

    `confidence` is the probability of that answer.
    """
    answers: dict[str, Tensor] = {}
    wrong = torch.zeros(len(batch["digit"]), NUMBERS)
    truths = true_classes(batch["digit"], scores)
    for head, logits, truth in zip(HEADS, scores, truths, strict=True):
        probability, answer = logits.softmax(2).max(2)
        answers[f"pred_{head.name}"] = answer.expand(-1, NUMBERS).cpu()
        answers[f"{head.name}_prob"] = probability.expand(-1, NUMBERS).cpu()
        of_head = (probability * (answer != truth)).expand(-1, NUMBERS).cpu()
        wrong = torch.maximum(wrong, of_head)
    confidence, numbers = wrong.max(1)
    for row in confidence.nonzero().flatten().tolist():
        number = int(numbers[row])
        mistake = {name: batch[name][row].item() for name in ("row_id", "digit")}
        mistake |= {"number": number, "confidence": confidence[row].item()}
        yield mistake | {name: values[row, number].item() for name, values in answers.items()}


def fit_temperatures(scored: ScoredRows) -> dict[str, float]:
    """Fit the temperature of each head, by its name, on rows that the model was not trained on."""
    batches = [(scores, true_classes(batch["digit"], scores)) for batch, scores in scored]
    temperatures = {}
    for index, head in enumerate(HEADS):
        logits = torch.cat([scores[index].flatten(0, 1) for scores, _ in batches])
        truth = torch.cat([classes[index].flatten() for _, classes in batches])
        temperatures[head.name] = fit_temperature(logits.cpu(), truth.cpu())
    return temperatures


def calibrated(scored: ScoredRows, temperatures: Mapping[str, float]) -> ScoredRows:
    """The rows with each head's scores divided by its temperature, as `fold_temperatures` does."""
    for batch, scores in scored:
        by_head = zip(HEADS, scores, strict=True)
        yield batch, tuple(logits / temperatures[head.name] for head, logits in by_head)


def fit_temperature(scores: Tensor, classes: Tensor) -> float:
    """Fit one temperature by maximum a posteriori; rounded, so that machines mostly agree."""
    scores = scores.double()

    def cost(log_temperature: float) -> float:
        nll = F.cross_entropy(scores * math.exp(-log_temperature), classes, reduction="sum").item()
        return nll + (log_temperature / _PRIOR_DEVIATION) ** 2 / 2

    # Golden-section search: the cost has a single minimum.
    low, high, golden = -_MAX_LOG_TEMPERATURE, _MAX_LOG_TEMPERATURE, (math.sqrt(5) - 1) / 2
    for _ in range(_SEARCH_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(f"{math.exp((low + high) / 2):.4g}")
