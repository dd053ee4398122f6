"""Every picture is legible, also for extreme or missing numbers."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.reliability import Reliability
from mnistsum_ray.reporting import pictures

TEST = {"loss": 0.25} | {f"{head.name}_accuracy": 0.9946 for head in HEADS}
NO_ERROR = TEST | {f"{head.name}_accuracy": 1.0 for head in HEADS}
HISTORY: list[dict[str, Any]] = [
    {"epoch": epoch, "step_losses": [[5, 2 / epoch], [9, 1 / epoch]], "test": TEST, "validation": TEST | {"loss": 0.2}}
    for epoch in (1, 2)
]
CONFUSION = (np.eye(10, dtype=int) * 50).tolist()
MISTAKE = {"digit": 3, "number": 4, "pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8}
IMAGES = np.zeros((8, 28, 28), np.uint8)
HISTOGRAMS = {"digit_prob": [0] * 19 + [1000], "sum_prob": [0] * 20}
RELIABILITY = Reliability([2] * 14 + [9_000], [2 * (place + 0.5) / 15 for place in range(14)] + [8_900.0], [1] * 14 + [8_950])

DRAWN = {
    "history": lambda: pictures.draw_history(HISTORY, {"epoch": 2, "test": TEST}),
    "one epoch, no error": lambda: pictures.draw_history(HISTORY[:1], {"epoch": 1, "test": NO_ERROR}),
    "confusion": lambda: pictures.draw_confusion(CONFUSION),
    "sums": lambda: pictures.draw_sums((np.array(CONFUSION).sum(1, keepdims=True).repeat(10, 1) - 1).tolist(), CONFUSION),
    "digits without rows": lambda: pictures.draw_sums(np.zeros((10, 10), int).tolist(), np.zeros((10, 10), int).tolist()),
    "mistakes": lambda: pictures.draw_mistakes([MISTAKE] * 8, IMAGES),
    "no mistakes": lambda: pictures.draw_mistakes([], IMAGES[:0]),
    "probabilities, and none": lambda: pictures.draw_probabilities(HISTOGRAMS),
    "reliability, and none": lambda: pictures.draw_reliability({"digit": RELIABILITY, "sum": Reliability()}),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_wide_enough_to_read_and_not_blank(name: str) -> None:
    with Image.open(io.BytesIO(DRAWN[name]())) as picture:
        grey = np.asarray(picture.convert("L"))
    assert 600 <= grey.shape[1] <= 1400
    assert (grey < 128).sum() > 200, "some ink"


def test_a_wrong_answer_is_named_with_the_right_one() -> None:
    half_right = MISTAKE | {"pred_digit": 3}
    figure = pictures.draw_mistakes.__wrapped__([MISTAKE, half_right], IMAGES[:2])  # type: ignore[attr-defined]
    (axes,) = figure.axes
    assert axes.images[0].get_cmap()(0)[:3] == (0, 0, 0), "the images as they are"
    assert [text.get_text() for text in axes.texts][1:] == [
        *("image + 4", "digit 5 (90%), not 3", "sum 9 (80%), not 7"),
        *("image + 4", "digit 3 (90%)", "sum 9 (80%), not 7"),
    ]
