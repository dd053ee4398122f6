"""Every picture is legible, also for extreme or missing numbers."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.reporting import pictures

TEST = {"loss": 0.25} | {f"{head.name}_accuracy": 0.9946 for head in HEADS}
HISTORY: list[dict[str, Any]] = [
    {"epoch": epoch, "train_loss": 1 / epoch, "test": TEST, "validation": TEST | {"loss": 0.2}} for epoch in (1, 2)
]
MODEL = {"epoch": 2, "test": TEST}
CONFUSION = (np.eye(10, dtype=int) * 50).tolist()
MISTAKE = {"digit": 3, "number": 4, "pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8}
IMAGES = np.zeros((8, 28, 28), np.uint8)
NONE = [0] * 20
BINS = [*NONE[1:], 1000]
RELIABILITY = Reliability(
    1.0, 1.0, [2] * 14 + [9_000], [2 * (place + 0.5) / 15 for place in range(14)] + [8_900.0], [1] * 14 + [8_950]
)

DRAWN = {
    "history": lambda: pictures.draw_history(HISTORY, MODEL),
    "one epoch": lambda: pictures.draw_history(HISTORY[:1], MODEL | {"epoch": 1}),
    "confusion": lambda: pictures.draw_confusion(CONFUSION),
    "sums": lambda: pictures.draw_sums((np.array(CONFUSION).sum(1, keepdims=True).repeat(10, 1) - 1).tolist(), CONFUSION),
    "digits without rows": lambda: pictures.draw_sums(np.zeros((10, 10), int).tolist(), np.zeros((10, 10), int).tolist()),
    "mistakes": lambda: pictures.draw_mistakes([MISTAKE] * 8, IMAGES),
    "no mistakes": lambda: pictures.draw_mistakes([], IMAGES[:0]),
    "probabilities": lambda: pictures.draw_probabilities({"digit_prob": BINS, "sum_prob": BINS}),
    "no rows": lambda: pictures.draw_probabilities({"digit_prob": NONE, "sum_prob": NONE}),
    "reliability": lambda: pictures.draw_reliability({"digit": RELIABILITY, "sum": RELIABILITY}),
    "reliability of no rows": lambda: pictures.draw_reliability({"digit": Reliability(), "sum": Reliability()}),
    "rejects": lambda: pictures.draw_rejects({f"reason {n} " * 12: 20 - n for n in range(20)}),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_wide_enough_to_read_and_not_blank(name: str) -> None:
    with Image.open(io.BytesIO(DRAWN[name]())) as picture:
        grey = np.asarray(picture.convert("L"))
    assert 600 <= grey.shape[1] <= 1400
    assert (grey < 128).sum() > 200, "some ink"


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert pictures.draw_confusion(CONFUSION) == pictures.draw_confusion(CONFUSION)
    other = np.array(CONFUSION)
    other[4, 9] = 3
    assert pictures.draw_confusion(CONFUSION) != pictures.draw_confusion(other.tolist())
