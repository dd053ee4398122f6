"""The report page of a training. That of a scoring: tests/integration/test_score.py."""

import re
from typing import Any

from mnistsum_ray.reporting.report import report_page

TEST = {"rows": 10, "pairs": 100, "loss": 0.25, "digit_accuracy": 0.91, "sum_accuracy": 0.8}
DESCRIPTION = {"parameters": 220_125, "sha256": "f" * 64, "epoch": 1, "test": TEST}
MANIFEST: dict[str, Any] = {
    "config": {"seed": 0, "name": "a <b> & c", "data": "sample", "precision": None},
    "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None},
    "data": {
        "source": "sample",
        "notice": "NOT the full MNIST",
        "train_rows": 4000,
        "bad_rows": {"rows": 0, "reasons": {}, "examples": []},
    },
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
}


def test_it_shows_what_a_person_looks_up_and_can_be_mailed() -> None:
    page = report_page(MANIFEST, DESCRIPTION, {"history.png": b"png"})
    for shown in ("91.00 %", "80.00 %", "1,234", "4,321 s", "cpu a CPU", "NOT the full MNIST"):
        assert shown in page, shown
    assert "a &lt;b&gt; &amp; c" in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page)
