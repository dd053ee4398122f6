"""Every picture is legible, also for extreme or missing numbers, and one that cannot be drawn costs a line."""

import io
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting import pictures
from mnistsum_ray.reporting.report import draw_pictures

TEST = {"loss": 0.25} | {f"{head.name}_accuracy": 0.9946 for head in HEADS}
NO_ERROR = TEST | {f"{head.name}_accuracy": 1.0 for head in HEADS}
HISTORY: list[dict[str, Any]] = [
    {
        "epoch": epoch,
        "step_losses": [[5, 2 / epoch], [9, 1 / epoch]],
        "test": TEST,
        "validation": TEST | {"loss": 0.2},
    }
    for epoch in (1, 2)
]
CONFUSION = (np.eye(10, dtype=int) * 50).tolist()
MISTAKE = {
    "digit": 3,
    "number": 4,
    "pred_digit": 5,
    "digit_prob": 0.9,
    "pred_sum": 9,
    "sum_prob": 0.8,
}
IMAGES = np.zeros((8, 28, 28), np.uint8)
BINS = {
    "rows": [2] * 14 + [9_000],
    "probability": [0.1] * 14 + [8_900.0],
    "right": [1] * 14 + [8_950],
}
RELIABILITY = {head.name: {"ece": 0.01, "reliability": BINS} for head in HEADS}

DRAWN: dict[str, tuple[Any, ...]] = {
    "history": (pictures.draw_history, HISTORY, {"epoch": 2, "test": TEST}),
    "one epoch, no error": (pictures.draw_history, HISTORY[:1], {"epoch": 1, "test": NO_ERROR}),
    "confusion": (pictures.draw_confusion, CONFUSION),
    "mistakes": (pictures.draw_mistakes, [MISTAKE] * 8, IMAGES),
    "no mistakes": (pictures.draw_mistakes, [], IMAGES[:0]),
    "reliability": (pictures.draw_reliability, RELIABILITY),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_wide_enough_to_read_and_not_blank(name: str) -> None:
    """Whatever the user's own settings of Matplotlib are."""
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):
        drawn = pictures.png(*DRAWN[name])
    with Image.open(io.BytesIO(drawn)) as picture:
        grey = np.asarray(picture.convert("L"))
    assert 600 <= grey.shape[1] <= 1400
    assert (grey < 128).sum() > 200, "some ink"


def test_a_wrong_answer_is_named_with_the_right_one() -> None:
    figure = pictures.draw_mistakes([MISTAKE, MISTAKE | {"pred_digit": 3}], IMAGES[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]


def test_a_picture_that_cannot_be_drawn_costs_a_line() -> None:
    said: list[str] = []
    drawn = draw_pictures(
        {"confusion.png": ([[1], [2, 3]],), "mistakes.png": ([], IMAGES[:0])}, said.append
    )
    assert list(drawn) == ["mistakes.png"]
    assert said[0].startswith("confusion.png cannot be drawn: ")
