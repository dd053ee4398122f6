"""Metrics on rows whose digit is known, and the finished model: calibrated and analysed.

Each image is paired with every number, and not with a random one: the sum accuracy then has no luck
in it. The convolutions, nearly all of the work, run once an image.

Temperatures calibrate the heads (Guo et al., "On Calibration of Modern Neural Networks", 2017): the
logits of a head are divided by its temperature before softmax.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.images import DIGITS, SIDE, Pixels
from mnistsum_ray.data.randomness import NUMBERS, RowTotals, mix_ids
from mnistsum_ray.model.device import all_reduce_sum, describe_hardware
from mnistsum_ray.model.folder import Weights, checksum, copy_weights, describe_model
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import Logits, TwoHeadCNN, make_network

RELIABILITY_BINS: Final = 15
"""Bins of equal width over the probability 0..1, as in Guo et al. (2017)."""

MAX_MISTAKES: Final = 24
"""Number of mistakes that are kept for the report: the surest, one an image."""

LabelledRows = dict[str, Tensor]
"""`image` uint8[n, 28, 28], `digit` and `row_id` int64[n]."""

RowsWithDigitLogits = list[tuple[LabelledRows, Tensor]]
"""Batches of rows, with their digit logits [n, 10]."""

RowsWithLogits = Iterable[tuple[LabelledRows, Logits]]
"""Batches of rows, with their `logits_of_all_numbers`."""

Metrics = dict[str, float]
"""`rows`, `pairs`, `loss` (mean cross-entropy of the pairs and the heads, in nats), and
`<head>_accuracy`."""


def true_classes(digits: Tensor, logits: Logits) -> list[Tensor]:
    """True classes by head, shaped as its logits: int64[n, NUMBERS], of the digit int64[n, 1]."""
    numbers = torch.arange(NUMBERS, device=digits.device)
    classes = []
    for index, head in enumerate(HEADS):
        target: Tensor = head.target(digits[:, None], numbers)
        classes.append(target.broadcast_to(logits[index].shape[:2]))
    return classes


class AnswerCounts:
    """Rows, right answers and losses, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        # Rows, the sum of their mixed ids, and right pairs of each head.
        self._counts = torch.zeros(2 + len(HEADS), dtype=torch.int64, device=device)
        self._losses = torch.zeros(len(HEADS), dtype=torch.float64, device=device)

    def add(self, batch: LabelledRows, logits: Logits) -> None:
        """Count one batch with its `logits_of_all_numbers`."""
        counts = [torch.ones_like(batch["row_id"]).sum(), mix_ids(batch["row_id"]).sum()]
        for index, truth in enumerate(true_classes(batch["digit"], logits)):
            is_right = logits[index].argmax(2) == truth
            counts.append(is_right.expand(-1, NUMBERS).sum())  # a digit's answer is for all pairs
            loss = F.cross_entropy(logits[index].flatten(0, 1), truth.flatten(), reduction="sum")
            answers_of_row = truth.size(1)  # NUMBERS, or 1 of the digit
            self._losses[index] += loss / answers_of_row
        self._counts += torch.stack(counts)

    def all_reduce(self) -> None:
        self._counts = all_reduce_sum(self._counts)
        self._losses = all_reduce_sum(self._losses)

    def metrics(self, totals: RowTotals) -> Metrics:
        """The metrics of all counted rows. RowCountError: a row was not counted exactly once."""
        rows, id_sum, *right = self._counts.tolist()
        totals.check(rows, id_sum, "evaluation")
        pairs = NUMBERS * rows
        metrics = {"rows": rows, "pairs": pairs, "loss": self._losses.mean().item() / rows}
        for head, count in zip(HEADS, right, strict=True):
            metrics[f"{head.name}_accuracy"] = count / pairs
        return metrics


def fit_temperatures(rows: RowsWithLogits) -> dict[str, float]:
    """Fit the temperature of each head, by its name, on rows that the model was not trained on."""
    batches = [(logits, true_classes(batch["digit"], logits)) for batch, logits in rows]
    temperatures = {}
    for index, head in enumerate(HEADS):
        of_head = torch.cat([logits[index].flatten(0, 1) for logits, _ in batches])
        truth = torch.cat([classes[index].flatten() for _, classes in batches])
        temperatures[head.name] = fit_temperature(of_head, truth)
    return temperatures


def fit_temperature(logits: Tensor, classes: Tensor) -> float:
    """Fit one temperature by maximum a posteriori; rounded, so that machines mostly agree."""
    logits = logits.double()

    def cost(log_temperature: float) -> float:
        nll = F.cross_entropy(logits * math.exp(-log_temperature), classes, reduction="sum").item()
        # A prior of standard deviation 0.5 holds the temperature up where no row is wrong.
        return nll + (log_temperature / 0.5) ** 2 / 2

    # Golden-section search: the cost has a single minimum.
    low, high, golden = -1.5, 1.5, (math.sqrt(5) - 1) / 2
    for _ in range(25):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    return float(f"{math.exp((low + high) / 2):.4g}")


def analyse_errors(
    rows: RowsWithLogits, temperatures: Mapping[str, float]
) -> tuple[dict[str, Any], Pixels]:
    """The entry `error_analysis` of manifest.json, of logits before they are calibrated.

    `confusion`: rows by true and predicted digit. `mistakes`: see `_mistakes`, the surest first.
    `probabilities`: by head the expected calibration error `ece`, the mean distance of probability
    and accuracy; and `reliability`, the counts behind it. For each bin of the probability of the
    answer it has the number of answers (`rows`), the sum of their `probability`, and how many are
    `right`.

    Returns the entry, and the images of its mistakes, uint8[m, 28, 28].
    """
    confusion = np.zeros((DIGITS, DIGITS), np.int64)
    bins = {head.name: np.zeros((3, RELIABILITY_BINS)) for head in HEADS}
    mistakes: list[dict[str, Any]] = []
    for batch, logits in rows:
        answers = {}
        confidence = torch.zeros(len(batch["digit"]), NUMBERS)
        truths = true_classes(batch["digit"], logits)
        for index, head in enumerate(HEADS):
            probabilities = (logits[index] / temperatures[head.name]).softmax(2)
            probability, answer = probabilities.max(2)
            is_right = answer == truths[index]
            bin_of = (probability * RELIABILITY_BINS).long().clamp(max=RELIABILITY_BINS - 1)
            bin_of = bin_of.flatten()
            count, probability_sum, right = bins[head.name]  # views of its three histograms
            count += np.bincount(bin_of, minlength=RELIABILITY_BINS)
            probability_sum += np.bincount(bin_of, probability.flatten(), RELIABILITY_BINS)
            right += np.bincount(bin_of, is_right.flatten(), RELIABILITY_BINS)
            answers[f"pred_{head.name}"] = answer.expand(-1, NUMBERS)
            answers[f"{head.name}_prob"] = probability.expand(-1, NUMBERS)
            confidence = torch.maximum(confidence, probability * ~is_right)
        np.add.at(confusion, (batch["digit"], answers["pred_digit"][:, 0]), 1)
        mistakes += _mistakes(batch, answers, confidence)
    mistakes = sorted(mistakes, key=itemgetter("confidence"), reverse=True)[:MAX_MISTAKES]
    images = [mistake.pop("image") for mistake in mistakes]
    described = {}
    for name, (count, probability_sum, right) in bins.items():
        described[name] = {
            "ece": float(np.abs(probability_sum - right).sum() / count.sum()),
            "reliability": {
                "rows": count.astype(int).tolist(),
                "probability": probability_sum.tolist(),
                "right": right.astype(int).tolist(),
            },
        }
    analysis = {"confusion": confusion.tolist(), "mistakes": mistakes, "probabilities": described}
    return analysis, np.array(images, np.uint8).reshape(-1, SIDE, SIDE)


def _mistakes(
    batch: LabelledRows, answers: dict[str, Tensor], confidence: Tensor
) -> Iterator[dict[str, Any]]:
    """The images with a wrong answer, each with the number whose wrong answer is the surest.

    `answers` are by column name and number; `confidence` is the probability of the surest wrong
    answer, float32[n, NUMBERS], 0 where all are right.
    """
    surest, numbers = confidence.max(1)
    for row in surest.nonzero().flatten().tolist():
        number = int(numbers[row])
        mistake = {name: batch[name][row].item() for name in ("row_id", "digit")}
        mistake |= {"number": number, "confidence": surest[row].item()}
        mistake |= {name: values[row, number].item() for name, values in answers.items()}
        yield mistake | {"image": batch["image"][row].numpy()}


@dataclass(frozen=True)
class FinishedModel:
    """A trained model, with what is known of it.

    Ray Train refuses tensors that a worker returns in a dict.
    """

    history: list[dict[str, Any]]  # lines of history.jsonl, one an epoch
    weights: Weights  # with the temperatures folded in
    description: dict[str, Any]  # of `describe_model`
    error_analysis: dict[str, Any]  # of `analyse_errors`, on test rows
    mistake_images: Pixels
    hardware: dict[str, Any]
    precision: str  # `bf16` or `fp32`, of the training


def finish_model(
    trained: TwoHeadCNN,
    validation: RowsWithDigitLogits,
    test: RowsWithDigitLogits,
    history: list[dict[str, Any]],
    precision: str,
) -> FinishedModel:
    """Calibrate the last epoch's model on validation rows, and analyse its errors on test rows.

    The rows are on the CPU. The same trained model and rows give the same finished one each time.
    """
    # A copy on the CPU, where the rows are. Folding would change the one that is trained.
    model = make_network()
    model.load_state_dict(trained.state_dict())
    # Two runs are compared by these bits, those before calibration.
    trained_sha256 = checksum(copy_weights(model))
    of_validation = [(batch, model.logits_of_all_numbers(logits)) for batch, logits in validation]
    temperatures = fit_temperatures(of_validation)
    of_test = ((batch, model.logits_of_all_numbers(logits)) for batch, logits in test)
    analysis, mistake_images = analyse_errors(of_test, temperatures)
    model.fold_temperatures(temperatures)
    weights, last = copy_weights(model), history[-1]
    metrics = {split: last[split] for split in ("validation", "test")}
    description = describe_model(weights, epoch=last["epoch"], metrics=metrics)
    of_heads = analysis["probabilities"].items()
    description["calibration_error"] = {name: head["ece"] for name, head in of_heads}
    description["trained_sha256"] = trained_sha256
    description["temperatures_in_weights"] = temperatures
    used = describe_hardware(next(trained.parameters()).device)
    return FinishedModel(history, weights, description, analysis, mistake_images, used, precision)
