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
ANALYSIS: dict[str, Any] = {
    "confusion": (np.eye(10, dtype=int) * 50).tolist(),
    "mistakes": [MISTAKE] * 8,
    "probabilities": {head: {"ece": 0.01, "reliability": BINS} for head in ("digit", "sum")},
}
MANIFEST: dict[str, Any] = {
    "config": {"name": "a <b> & c"},
    "data": {"notice": "NOT the full MNIST", "bad_rows": {"reasons": {}, "examples": []}},
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
    "error_analysis": ANALYSIS,
}


def test_it_can_be_mailed_and_has_the_pictures_that_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plots._DRAW, "confusion.png", lambda _: 1 / 0)
    place, said = Location(str(tmp_path)), list[str]()
    write_report(place, MANIFEST, DESCRIPTION, [EPOCH] * 2, IMAGES, said.append)
    assert said == ["confusion.png cannot be drawn: division by zero; report.html is without it"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len([*tmp_path.glob("*.png")]) == 3
    assert "a &lt;b&gt; &amp; c" in page
    assert "NOT the full MNIST" in page
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page)
