"""The report of a training and its pictures. That of a scoring: tests/integration/test_score.py."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.reporting import plots
from mnistsum_ray.reporting.report import write_report
from mnistsum_ray.storage.store import Location

TEST = {"rows": 10, "loss": 0.25, "digit_accuracy": 0.91, "sum_accuracy": 0.8}
NO_ERROR = TEST | {"digit_accuracy": 1.0, "sum_accuracy": 1.0}
EPOCH: dict[str, Any] = {"epoch": 1, "step_losses": [[5, 2.0], [9, 1.0]]}
EPOCH |= {"test": NO_ERROR, "validation": TEST}
MISTAKE: dict[str, Any] = {"digit": 3, "number": 4}
MISTAKE |= {"pred_digit": 5, "digit_prob": 0.9, "pred_sum": 9, "sum_prob": 0.8}
IMAGES = np.zeros((8, 28, 28), np.uint8)
BINS = {"rows": [0] * 14 + [9_000], "probability": [0.0] * 14 + [8_900.0], "right": [0] * 14 + [1]}
MANIFEST: dict[str, Any] = {
    "config": {"name": "a <b> & c", "learning_rate": 0.02},
    "data": {"notice": "NOT the full MNIST", "bad_rows": {"reasons": {}, "examples": []}},
    "metrics": {"run": "/runs/my run", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
    "error_analysis": {
        "confusion": (np.eye(10, dtype=int) * 50).tolist(),
        "mistakes": [MISTAKE] * 8,
        "probabilities": {head: {"ece": 0.01, "reliability": BINS} for head in ("digit", "sum")},
    },
}


def test_the_dots_of_the_reliability_have_their_numbers_of_answers() -> None:
    figure = plots.draw_reliability(MANIFEST["error_analysis"]["probabilities"])
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["9,000", "9,000"]


@pytest.mark.filterwarnings("error")
def test_it_can_be_mailed_and_has_the_pictures_that_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "draw_reliability", lambda _: 1 / 0)
    place, said = Location(str(tmp_path)), list[str]()
    description = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "test": TEST}
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):  # of the user
        write_report(place, MANIFEST, description, [EPOCH] * 2, IMAGES, said.append)
    assert said == ["a picture cannot be drawn: division by zero; report.html is without it"]
    page = (tmp_path / "report.html").read_text()
    pictures = [*tmp_path.glob("*.png")]
    assert page.count("data:image/png;base64,") == len(pictures) == 3
    for file in pictures:
        with Image.open(file) as picture:
            assert 600 <= picture.width <= 1400, "wide enough to read"
    assert "a &lt;b&gt; &amp; c" in page
    assert "NOT the full MNIST" in page
    assert (
        "mnistsum score --model &#39;/runs/my run&#39; --input PAIRS --output SCORED</pre>" in page
    )
    assert "<tr><td>0</td><td>50</td><td>100.00 %</td></tr>" in page
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page)


def test_a_wrong_answer_is_named_with_the_right_one_and_none_is_no_error() -> None:
    assert plots.draw_png(plots.draw_mistakes, [], IMAGES[:0])
    figure = plots.draw_mistakes([MISTAKE, MISTAKE | {"pred_digit": 3}], IMAGES[:2])
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "image + 4\ndigit 5 (90%), not 3\nsum 9 (80%), not 7",
        "image + 4\ndigit 3 (90%)\nsum 9 (80%), not 7",
    ]
