"""The report of a training and its pictures. That of a scoring: tests/integration/test_score.py."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mnistsum_ray.mnist import report
from mnistsum_ray.reporting import plots
from mnistsum_ray.reporting.report import write_report
from mnistsum_ray.storage.store import Location
from mnistsum_ray.task import BUILT_IN, Findings

TEST = {"rows": 10, "loss": 0.25, "digit_accuracy": 0.91, "mean_error": 0.8}
EPOCH: dict[str, Any] = {"epoch": 1, "step_losses": [[5, 2.0], [9, 1.0]]}
EPOCH |= {"test": TEST | {"digit_accuracy": 1.0}, "validation": TEST}
MANIFEST: dict[str, Any] = {
    "config": {"name": "a <b> & c", "learning_rate": 0.02, "task": BUILT_IN},
    "data": {"notice": "NOT the full set", "bad_rows": {"reasons": {}, "examples": []}},
    "metrics": {"run": "/runs/my run", "rows_per_second": 1234.5},
    "training_seconds": 4321.0,
}
DESCRIPTION = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "test": TEST}
CONFUSION = (np.eye(10, dtype=int) * 50).tolist()
NO_IMAGES = np.zeros((0, 28, 28), np.uint8)


@pytest.mark.filterwarnings("error")
def test_it_can_be_mailed_and_has_the_pictures_that_can_be_drawn(tmp_path: Path) -> None:
    """Of a task's pictures too; what cannot be drawn never costs the run."""
    place, said = Location(str(tmp_path)), list[str]()
    findings = Findings(
        tables=[report.confusion_table(CONFUSION)],
        pictures={
            "mistakes.png": ("Mistakes", lambda: report.draw_mistakes([], NO_IMAGES)),
            "broken.png": ("Broken", lambda: 1 / 0),  # type: ignore[dict-item,return-value]
        },
        notice="cheap & cheerful",
    )
    with matplotlib.rc_context({"text.usetex": True, "figure.dpi": 20}):  # of the user
        write_report(place, MANIFEST, DESCRIPTION, [EPOCH] * 2, findings, said.append)
    assert said == ["a picture cannot be drawn: division by zero; report.html omits it"]
    page = (tmp_path / "report.html").read_text()
    pictures = [*tmp_path.glob("*.png")]
    assert page.count("data:image/png;base64,") == len(pictures) == 2
    for file in pictures:
        with Image.open(file) as picture:
            assert 600 <= picture.width <= 2025, "wide enough to read"
    command = "mnistsum score --model &#39;/runs/my run&#39; --input ROWS --output SCORED</pre>"
    cells = "<td>50</td><td>100.00 %</td></tr>"
    for shown in (
        "a &lt;b&gt; &amp; c",
        "NOT the full set",
        "cheap &amp; cheerful",
        command,
        cells,
    ):
        assert shown in page
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page)


def test_metrics_of_any_names_are_drawn_and_errors_apart() -> None:
    for metrics, titles in (
        (TEST, ["loss", "error, %", "metrics"]),
        ({"rows": 10, "loss": -0.25}, ["loss"]),
    ):
        entry = EPOCH | {"test": metrics, "validation": metrics}
        figure = plots.draw_history([entry] * 2, 0.02)
        shown = [axes.get_title() for axes in figure.axes]
        assert [title for title in shown if title] == titles
        assert plots.draw_png(plots.draw_history, [entry], 0.02)
