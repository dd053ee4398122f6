"""The report pages, with all optional parts and with none."""

import re
from collections import Counter
from typing import Any

from mnistsum_ray.data.images import ReasonCounts
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.reporting.report import PICTURES, report_page, scored_page
from tests.reporting.test_tensorboard import entry

TEST = entry(1)["test"]
TUNED = {
    "steps": 4000,
    "kept": True,
    "before": {"validation": TEST, "test": TEST | {"sum_accuracy": 0.7654}},
    "after": {"validation": TEST, "test": TEST},
}
CARD: dict[str, Any] = {
    "parameters": 220_125,
    "sha256": "f" * 64,
    "epoch": 1,
    "test": TEST,
    "sum_head": TUNED,
}
DATA = {"source": "sample", "notice": "NOT the full MNIST", "train_rows": 4000}
MANIFEST: dict[str, Any] = {
    "config": {"seed": 0, "name": "a <b> & c", "data": "sample", "precision": None},
    "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None},
    "data": DATA | {"bad_rows": {"rows": 0, "reasons": {}, "examples": []}},
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
}
FILE, REASON = (
    "folder/a_long_name_of_a_file.parquet",
    "the number is 44, not one of 0..9; correct it or drop the row",
)
BAD: dict[str, Any] = {"reasons": Counter({REASON: 1}), "examples": [(FILE, 3, REASON)]}
SCORED: dict[str, Any] = {
    "totals": {
        "output": "/out", "input_rows": 5, "scored_rows": 4, "rejected_rows": 1, "failed_rows": 0, "files": 1,
        "failed_files": 0, "rows_per_second": 10.0,
    } | {f"{head.name}_accuracy": 0.75 for head in HEADS},
    "labelled_rows": 3,
    "config": {"input": "/a/folder"},
    "model": {"sha256": "f" * 64},
}  # fmt: skip


def cells(page: str, title: str) -> list[str]:
    """The rows of the table below a title, without tags."""
    table = page.partition(f"<h2>{title}</h2>")[2].partition("</table>")[0]
    return [" ".join(re.sub("<[^>]+>", " ", line).split()) for line in table.split("</tr>")][:-1]


def test_the_page_of_a_training_shows_what_the_run_has() -> None:
    manifest = MANIFEST | {"data": DATA | {"bad_rows": {"rows": 1, **BAD}}}
    pictures = dict.fromkeys(PICTURES, b"png")
    page = report_page("mine", manifest, CARD, [entry(1), entry(2)], pictures)
    for shown in (
        "91.00 %",
        "80.00 %",
        "1,234",
        "4,321 s",
        "cpu a CPU, cores 2",
        "a &lt;b&gt; &amp; c",
        "NOT the full MNIST",
    ):
        assert shown in page, shown
    assert len(cells(page, "Epochs")) == 3
    assert cells(page, "Rows left out")[1:] == [f"1 {REASON} {FILE}, row 3"]
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page), "it can be mailed"
    plain = report_page("mine", MANIFEST, CARD | {"sum_head": None}, [entry(1)], {})
    assert "Rows left out" not in plain


def test_the_page_of_a_scoring_shows_the_reasons() -> None:
    page = scored_page(SCORED, ReasonCounts(**BAD), {"confusion.png": b"png"})
    assert "4 of 5 rows scored" in page
    assert "75.00 %" in page
    assert cells(page, "Rejected rows")[1:] == [f"1 {REASON} {FILE}, row 3"]
    totals = {name: value for name, value in SCORED["totals"].items() if "accuracy" not in name}
    page = scored_page(SCORED | {"labelled_rows": None, "totals": totals}, ReasonCounts(), {})
    assert "correct" not in page


def test_control_characters_are_escaped() -> None:
    """A file name or a message of the storage may hold them, and a page is read in terminals too."""
    raw, shown, reason = "a\x1b]0;b\x07", r"a\x1b]0;b\x07", "is\x1b[2J"
    counts = ReasonCounts(Counter({reason: 1}), [(raw, 3, reason)])
    page = scored_page(SCORED | {"config": SCORED["config"] | {"input": raw}}, counts, {})
    assert shown in page
    assert page.replace("\n", "").isprintable()
