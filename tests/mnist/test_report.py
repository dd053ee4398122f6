"""Pictures, tables and the notice of reports. The page: tests/reporting/test_report.py."""

from typing import Any

import numpy as np

from mnistsum_ray.mnist import report
from mnistsum_ray.reporting.plots import draw_png

MISTAKE: dict[str, Any] = {"digit": 3, "number": 4}
MISTAKE |= {"pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8}
IMAGES = np.zeros((8, 28, 28), np.uint8)
BINS = {"rows": [0] * 14 + [9_000], "probability": [0.0] * 14 + [8_900.0], "right": [0] * 14 + [1]}


def test_the_dots_of_the_reliability_have_their_numbers_of_answers() -> None:
    heads = {head: {"ece": 0.01, "reliability": BINS} for head in ("digit", "sum")}
    figure = report.draw_reliability(heads)
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["9,000", "9,000"]


def test_a_wrong_answer_is_named_with_the_right_one_and_none_is_no_error() -> None:
    assert draw_png(report.draw_mistakes, [], IMAGES[:0])
    figure = report.draw_mistakes([MISTAKE, MISTAKE | {"pred_digit": 3}], IMAGES[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]


def test_most_images_light_at_their_edges_are_noticed() -> None:
    predicted = {name: np.zeros(8, np.int8) for name in ("pred_digit", "consistent")}
    predicted |= {name: np.ones(8, np.float32) for name in ("digit_prob", "sum_prob")}
    for light, notice in (
        (IMAGES, ""),
        (255 - IMAGES, "100.00 % of the images are light at their"),
    ):
        counts = report.count(predicted, {"image": light})
        assert report.describe(counts).notice.startswith(notice)
        assert counts["digit_probabilities"].tolist() == [0] * 9 + [8]
