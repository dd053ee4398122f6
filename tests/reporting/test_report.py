"""The report page of a training. That of a scoring: tests/integration/test_score.py."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnistsum_ray.reporting import plots
from mnistsum_ray.reporting.report import write_report
from mnistsum_ray.storage.store import Location
from tests.reporting.test_plots import EPOCH, IMAGES, MISTAKE

TEST = {"rows": 10, "loss": 0.25, "digit_accuracy": 0.91, "sum_accuracy": 0.8}
DESCRIPTION = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "test": TEST}
BINS = {"rows": [0] * 14 + [9_000], "probability": [0.0] * 14 + [8_900.0], "right": [0] * 14 + [1]}
MANIFEST: dict[str, Any] = {
    "config": {"seed": 0, "name": "a <b> & c", "data": "sample", "precision": None},
    "data": {
        "notice": "NOT the full MNIST",
        "bad_rows": {"rows": 0, "reasons": {}, "examples": []},
    },
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
    "error_analysis": {
        "confusion": (np.eye(10, dtype=int) * 50).tolist(),
        "mistakes": [MISTAKE] * 8,
        "probabilities": {head: {"ece": 0.01, "reliability": BINS} for head in ("digit", "sum")},
    },
}


def test_it_shows_what_a_person_looks_up_and_the_pictures_that_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plots._DRAW, "confusion.png", lambda _: 1 / 0)
    said: list[str] = []
    write_report(Location(str(tmp_path)), MANIFEST, DESCRIPTION, [EPOCH] * 2, IMAGES, said.append)
    assert said == ["confusion.png cannot be drawn: division by zero; report.html is without it"]
    pictures = ["history.png", "mistakes.png", "reliability.png"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == pictures
    page = (tmp_path / "report.html").read_text()
    for shown in ("91.00 %", "80.00 %", "1,234", "4,321 s", "NOT the full MNIST"):
        assert shown in page, shown
    assert "a &lt;b&gt; &amp; c" in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page), "it can be mailed"
