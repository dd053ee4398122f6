"""What is done with a trained network: its heads are calibrated, and its errors analysed.

Temperatures calibrate the heads (Guo et al., "On Calibration of Modern Neural Networks", 2017): the
logits of a head are divided by its temperature before softmax.
"""

import math
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnistsum_ray.data.columns.base import Array
from mnistsum_ray.mnist import DIGITS, HEADS, NUMBERS, SIDE, SUMS
from mnistsum_ray.mnist.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN
from mnistsum_ray.mnist.report import confusion_table, draw_mistakes, draw_reliability
from mnistsum_ray.task import Batch, Evaluated, Findings

RELIABILITY_BINS: Final = 15  # of equal width over the probability 0..1, as in Guo et al.
MAX_MISTAKES: Final = 24  # that are kept for the report: the surest, one an image


def finish(network: TwoHeadCNN, test: Evaluated) -> Findings:
    """Analyse the errors of a calibrated network on test rows."""
    analysis, images = analyse_errors(network, test)
    of_heads = analysis["probabilities"]
    image = f"{SIDE} x {SIDE} grayscale, uint8, 0 background, 255 ink"
    scaled = {"scaled": "(image / 255 - mean) / std", "mean": PIXEL_MEAN, "std": PIXEL_STD}
    surest = "The most confident mistakes"
    reliability = "Reliability: accuracy by predicted probability, with numbers of answers"
    return Findings(
        manifest={"error_analysis": analysis},
        model={
            "input": {"image": image, **scaled, "number": f"0..{NUMBERS - 1}"},
            "output": {"digit": f"{DIGITS} scores", "sum": f"{SUMS} scores"},
            "calibration_error": {name: of_head["ece"] for name, of_head in of_heads.items()},
        },
        tables=[confusion_table(analysis["confusion"])],
        pictures={
            "mistakes.png": (surest, partial(draw_mistakes, analysis["mistakes"], images)),
            "reliability.png": (reliability, partial(draw_reliability, of_heads)),
        },
    )


@torch.no_grad()
def with_all_numbers(
    network: TwoHeadCNN, batch: Batch, digit_logits: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """Return each head with its logits and the true classes, of each image with every number.

    float32[n, NUMBERS, classes] and int64[n, NUMBERS]; of the digit, which does not depend on the
    number, [n, 1, classes] and [n, 1]. With random numbers, the sum accuracy would be one of luck.
    """
    rows, digits = len(digit_logits), batch["digit"][:, None]
    numbers = torch.arange(NUMBERS, device=digit_logits.device)
    repeated = digit_logits.repeat_interleave(NUMBERS, dim=0)
    sums = network.sum_logits(repeated, numbers.repeat(rows)).view(rows, NUMBERS, SUMS)
    return [("digit", digit_logits[:, None], digits), ("sum", sums, digits + numbers)]


def of_all_rows(network: TwoHeadCNN, rows: Evaluated) -> dict[str, tuple[Tensor, Tensor]]:
    """By head the logits and the true classes, as of `with_all_numbers`, of all batches."""
    batches = [with_all_numbers(network, *one) for one in rows]
    found = {}
    for index, head in enumerate(HEADS):
        logits = torch.cat([of_heads[index][1] for of_heads in batches])
        truth = torch.cat([of_heads[index][2] for of_heads in batches])
        found[head] = logits, truth
    return found


def fit_temperatures(network: TwoHeadCNN, rows: Evaluated) -> dict[str, float]:
    """Fit the temperature of each head, by its name, on rows that it was not trained on."""
    temperatures = {}
    for head, (logits, truth) in of_all_rows(network, rows).items():
        temperatures[head] = fit_temperature(logits.flatten(0, 1), truth.flatten())
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


def analyse_errors(network: TwoHeadCNN, rows: Evaluated) -> tuple[dict[str, Any], Array]:
    """Return the entry `error_analysis` of manifest.json, and the images of its mistakes.

    `confusion`: rows by true and predicted digit. `mistakes`: images with a wrong answer, each with
    the number whose wrong answer is the surest; the surest first. `probabilities`: see
    `_reliability`, by head.
    """
    known = {key: torch.cat([batch[key] for batch, _ in rows]) for key in rows[0][0]}
    of_heads, answers = {}, {}
    confidence = torch.zeros(len(known["digit"]), NUMBERS)  # of the surest wrong answer
    for head, (logits, truth) in of_all_rows(network, rows).items():
        probability, answer = logits.softmax(2).max(2)
        is_right = answer == truth
        of_heads[head] = _reliability(probability.flatten(), is_right.flatten())
        answers[f"pred_{head}"] = answer.expand(-1, NUMBERS)
        answers[f"{head}_prob"] = probability.expand(-1, NUMBERS)
        confidence = torch.maximum(confidence, probability * ~is_right)
    cells = DIGITS * known["digit"] + answers["pred_digit"][:, 0]
    confusion = torch.bincount(cells, minlength=DIGITS**2).view(DIGITS, DIGITS)
    surest, numbers = confidence.max(1)
    mistakes, images = [], []
    for row in surest.argsort(descending=True)[:MAX_MISTAKES].tolist():
        if surest[row] == 0:  # all answers are right
            break
        number = int(numbers[row])
        mistake = {name: known[name][row].item() for name in ("row_id", "digit")}
        mistake |= {"number": number, "confidence": surest[row].item()}
        mistake |= {name: values[row, number].item() for name, values in answers.items()}
        mistakes.append(mistake)
        images.append(known["image"][row].numpy())
    analysis = {"confusion": confusion.tolist(), "mistakes": mistakes, "probabilities": of_heads}
    return analysis, np.array(images, np.uint8).reshape(-1, SIDE, SIDE)


def _reliability(probabilities: Tensor, is_right: Tensor) -> dict[str, Any]:
    """Return the expected calibration error `ece`, the mean distance of probability and accuracy.

    Of answers, float32[m] and bool[m]. `reliability` has for each bin of the probability the number
    of answers, and the sums of both.
    """
    bins = (probabilities * RELIABILITY_BINS).long().clamp(max=RELIABILITY_BINS - 1)
    rows = np.bincount(bins, minlength=RELIABILITY_BINS)
    probability = np.bincount(bins, probabilities, RELIABILITY_BINS)
    right = np.bincount(bins, is_right, RELIABILITY_BINS)
    ece = float(np.abs(probability - right).sum() / rows.sum())
    sums = {"probability": probability.tolist(), "right": right.astype(int).tolist()}
    return {"ece": ece, "reliability": {"rows": rows.tolist(), **sums}}
