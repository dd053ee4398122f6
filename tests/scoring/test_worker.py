"""A worker's task: rows are read once and in order, and the reports count what is in its parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.scoring.actor import Report
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.output import count_parts
from mnistsum_ray.scoring.parts import Part, split_into_parts
from mnistsum_ray.scoring.request import Request
from mnistsum_ray.scoring.worker import DecodedPart, Scorer, read_parts
from tests.conftest import write_model
from tests.scoring.conftest import CONSOLE, preflight_of, write_rows


def parts_of(request: Request) -> list[Part]:
    return split_into_parts(request.files, request.config.max_rows_per_file)[0]


@pytest.mark.parametrize(("most", "group"), [(7, 90), (100, 1000), (500, 90), (2000, 90)])
def test_every_row_is_read_once_in_order_and_decoded(
    tmp_path: Path, model: Path, most: int, group: int
) -> None:
    write_rows(tmp_path / "a.parquet", range(1000), group, bad=501)
    table = pq.read_table(tmp_path / "a.parquet")
    request = preflight_of(model, tmp_path, "/nowhere", max_rows_per_file=most)
    for chosen in (parts_of(request), parts_of(request)[1::3]):
        read = [*read_parts(request, chosen)]
        assert [part for part, _ in read] == chosen
        for part, decoded in read:
            rows = table.slice(part.first_row, part.rows)
            assert isinstance(decoded, DecodedPart)
            assert decoded.table.equals(rows)
            assert [image.tobytes() for image in decoded.images] == rows["image"].to_pylist()
            bad = rows["id"].to_numpy() == 501
            assert [*decoded.reasons] == np.flatnonzero(bad).tolist()
            assert decoded.numbers.tolist() == np.where(bad, 0, rows["number"]).tolist()


def score(request: Request, parts: list[Part]) -> tuple[RowCounts, list[Report]]:
    """Score parts as one task: their counts, and all reports."""
    counts, reports = RowCounts(), [*Scorer(request, "cpu").score(parts)]
    for report in reports:
        counts.add(report.counts or RowCounts())
    return counts, reports


def test_the_reports_of_a_task_count_the_rows_of_the_parts_that_are_there(
    tmp_path: Path, model: Path
) -> None:
    """One file's last part is damaged. A part that another process has put is counted as it is."""
    files = {name: tmp_path / "in" / name for name in ("a.parquet", "b.parquet", "c.parquet")}
    for start, path in enumerate(files.values()):
        write_rows(path, range(9 * start, 9 * start + 9), bad=20)
    data = files["b.parquet"].read_bytes()
    pages = pq.read_metadata(files["b.parquet"]).row_group(2).column(1)
    damaged = data[pages.dictionary_page_offset :][:20]
    files["b.parquet"].write_bytes(data.replace(damaged, b"?" * 20))
    output = tmp_path / "out"
    settings = {"max_rows_per_file": 4, "label_column": "label"}
    request = preflight_of(model, tmp_path / "in", output, **settings)
    counts, (*between, ends) = score(request, parts_of(request))
    unusable = [*{name for report in between for name in report.unusable}]
    assert (ends.ends, unusable) == (True, ["b.parquet"])
    parts = parts_of(request)
    there = [part for part in parts if (output / "predictions" / part.output).exists()]
    assert there == parts[:5] + parts[6:]
    assert counts == count_parts(request, there, CONSOLE)
    other = preflight_of(write_model(tmp_path / "model", 1), tmp_path / "in", output)
    again, _ = score(replace(request, weights=other.weights), there)
    assert again == counts == count_parts(request, there, CONSOLE)


def test_a_storage_that_does_not_answer_is_no_fault_of_the_file(
    tmp_path: Path, model: Path
) -> None:
    write_rows(tmp_path / "in" / "a.parquet", [1])
    request = preflight_of(model, tmp_path / "in", model / "model.json" / "out")
    _, (written, _) = score(request, parts_of(request))
    (tmp_path / "in" / "a.parquet").unlink()
    _, (read, _) = score(request, parts_of(request))
    assert str(written.failed).startswith("--output ")
    assert str(read.failed).startswith("--input ")
    assert (written.unusable, read.unusable) == ({}, {})
