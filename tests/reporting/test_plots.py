"""Every picture is drawn, also of extreme or missing numbers."""

import io
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.reporting import plots

TEST = {"loss": 0.25, "digit_accuracy": 0.9946, "sum_accuracy": 0.9946}
NO_ERROR = TEST | {"digit_accuracy": 1.0, "sum_accuracy": 1.0}
LOSSES = [[5, 2.0], [9, 1.0]]
HISTORY: list[dict[str, Any]] = [
    {"epoch": epoch, "step_losses": LOSSES, "test": TEST, "validation": TEST} for epoch in (1, 2)
]
MISTAKE = {
    "digit": 3, "number": 4, "pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8,
}  # fmt: skip
IMAGES = np.zeros((8, 28, 28), np.uint8)
BINS = {"rows": [0] * 14 + [9_000], "probability": [0.0] * 14 + [8_900.0], "right": [0] * 14 + [1]}

DRAWN: dict[str, tuple[Any, ...]] = {
    "history": (plots.draw_history, HISTORY),
    "no error": (plots.draw_history, [HISTORY[0] | {"test": NO_ERROR, "validation": NO_ERROR}]),
    "confusion": (plots.draw_confusion, (np.eye(10, dtype=int) * 50).tolist()),
    "mistakes": (plots.draw_mistakes, [MISTAKE] * 8, IMAGES),
    "no mistakes": (plots.draw_mistakes, [], IMAGES[:0]),
    "reliability": (
        plots.draw_reliability,
        {head: {"ece": 0.01, "reliability": BINS} for head in ("digit", "sum")},
    ),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_wide_enough_to_read_whatever_the_users_settings_are(name: str) -> None:
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):
        drawn = plots.png(*DRAWN[name])
    with Image.open(io.BytesIO(drawn)) as picture:
        assert 600 <= picture.width <= 1400


def test_a_wrong_answer_is_named_with_the_right_one() -> None:
    figure = plots.draw_mistakes([MISTAKE, MISTAKE | {"pred_digit": 3}], IMAGES[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]
