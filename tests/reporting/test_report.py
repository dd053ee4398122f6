"""The report pages: what a person looks up there, and no character that a terminal obeys."""

import re
from typing import Any

from mnistsum_ray.reporting.report import report_page, scored_page
from mnistsum_ray.scoring.counts import RowCounts
from tests.reporting.test_tensorboard import entry

CARD: dict[str, Any] = {"parameters": 220_125, "sha256": "f" * 64, **entry(1)}
FILE = "folder/a_long_name_of_a_file.parquet"
REASON = "the number is 44, not one of 0..9; correct it or drop the row"
BAD: dict[str, Any] = {"reasons": {REASON: 1}, "examples": {REASON: [[FILE, 3]]}}
DATA = {"source": "sample", "notice": "NOT the full MNIST", "train_rows": 4000}
MANIFEST: dict[str, Any] = {
    "config": {"seed": 0, "name": "a <b> & c", "data": "sample", "precision": None},
    "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None},
    "data": DATA | {"bad_rows": {"rows": 1, **BAD}},
    "metrics": {"run": "/runs/mine", "images_per_second": 1234.5},
    "training_seconds": 4321.0,
}
COUNTED = {"input_rows": 5, "scored_rows": 4, "rejected_rows": 1, "failed_rows": 0}
FILES = {"output": "/out", "files": 1, "failed_files": 0, "rows_per_second": 10.0}
ACCURACIES = {"digit_accuracy": 0.75, "sum_accuracy": 0.75}
SCORED: dict[str, Any] = {
    "totals": COUNTED | FILES | ACCURACIES,
    "labelled_rows": 3,
    "config": {"input": "/a/folder"},
    "model": {"sha256": "f" * 64},
}


def cells(page: str, title: str) -> list[str]:
    """The rows of the table below a title, without tags and the names of the columns."""
    table = page.partition(f"<h2>{title}</h2>")[2].partition("</table>")[0]
    lines = [" ".join(re.sub("<[^>]+>", " ", line).split()) for line in table.split("</tr>")]
    return lines[1:-1]


def test_the_page_of_a_training() -> None:
    page = report_page("mine", MANIFEST, CARD, [entry(1), entry(2)], {"history.png": b"png"})
    for shown in ("91.00 %", "80.00 %", "1,234", "4,321 s", "cpu a CPU, cores 2", DATA["notice"]):
        assert str(shown) in page, shown
    assert "a &lt;b&gt; &amp; c" in page
    assert len(cells(page, "Epochs")) == 2
    assert cells(page, "Rows left out") == [f"1 {REASON} {FILE}, row 3"]
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page), "it can be mailed"


def test_the_page_of_a_scoring_shows_reasons_and_the_least_sure_rows() -> None:
    unsure: list[tuple[Any, ...]] = [
        (0.1 * row, FILE, row, 4, 5, label) for row, label in enumerate((9, 4, None))
    ]
    page = scored_page(SCORED, RowCounts(**BAD, unsure=unsure), {})
    assert "4 of 5 rows scored" in page
    assert "75.00 %" in page
    assert cells(page, "Rejected rows") == [f"1 {REASON} {FILE}, row 3"]
    assert cells(page, "The least sure rows") == [
        f"4 0.000 9 5 {FILE}, row 0",
        f"4 0.100 4 5 {FILE}, row 1",
        f"4 0.200 unknown 5 {FILE}, row 2",
    ]
    no_labels = SCORED | {"labelled_rows": None, "totals": COUNTED | FILES}
    assert "correct" not in scored_page(no_labels, RowCounts(), {})


def test_control_characters_are_escaped() -> None:
    """The name of a file may hold them, and a message of the storage."""
    raw, shown, reason = "a\x1b]0;b\x07", r"a\x1b]0;b\x07", "is\x1b[2J"
    unsure: list[tuple[Any, ...]] = [(0.1, raw, 0, 1, 2, None)]
    counts = RowCounts(reasons={reason: 1}, examples={reason: [[raw, 3]]}, unsure=unsure)
    page = scored_page(SCORED | {"config": {"input": raw}}, counts, {})
    assert shown in page
    assert page.replace("\n", "").isprintable()
