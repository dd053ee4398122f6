"""The report page of a training. That of a scoring: tests/integration/test_score.py."""

import re
from typing import Any

from mnistsum_ray.reporting.report import report_page

HELD_OUT = {"rows": 10, "pairs": 100, "loss": 0.25, "digit_accuracy": 0.91, "sum_accuracy": 0.8}
ENTRY: dict[str, Any] = {
    "epoch": 1,
    "train_loss": 0.5,
    "learning_rate": 0.01,
    "rows_per_second": 1000.0,
    "waiting": 0.01,
    "validation": HELD_OUT,
    "test": HELD_OUT,
}
DESCRIPTION: dict[str, Any] = {"parameters": 220_125, "sha256": "f" * 64, **ENTRY}
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
    page = report_page(MANIFEST, DESCRIPTION, [ENTRY, ENTRY], {"history.png": b"png"})
    for shown in ("91.00 %", "80.00 %", "1,234", "4,321 s", "cpu a CPU", "NOT the full MNIST"):
        assert shown in page, shown
    assert "a &lt;b&gt; &amp; c" in page
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page)
