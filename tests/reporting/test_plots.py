"""Pictures of extreme or missing numbers, and what stands beside the images of mistakes.

All others: test_report.py.
"""

import io
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.reporting import plots

TEST = {"loss": 0.25, "digit_accuracy": 0.9946, "sum_accuracy": 0.9946}
NO_ERROR = TEST | {"digit_accuracy": 1.0, "sum_accuracy": 1.0}
EPOCH: dict[str, Any] = {
    "epoch": 1, "step_losses": [[5, 2.0], [9, 1.0]], "test": TEST, "validation": TEST,
}  # fmt: skip
MISTAKE = {
    "digit": 3, "number": 4, "pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8,
}  # fmt: skip
IMAGES = np.zeros((8, 28, 28), np.uint8)

EXTREMES: dict[str, tuple[Any, ...]] = {
    "history.png": ([EPOCH | {"test": NO_ERROR, "validation": NO_ERROR}],),
    "mistakes.png": ([], IMAGES[:0]),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_wide_enough_to_read_whatever_the_users_settings_are(name: str) -> None:
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):
        drawn = plots.png(name, *EXTREMES[name])
    with Image.open(io.BytesIO(drawn)) as picture:
        assert 600 <= picture.width <= 1400


def test_a_wrong_answer_is_named_with_the_right_one() -> None:
    figure = plots.draw_mistakes([MISTAKE, MISTAKE | {"pred_digit": 3}], IMAGES[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]
