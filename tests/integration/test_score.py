"""Good and bad rows and files, scored by several workers: what comes out is what was asked for."""

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mnistsum_ray import TryAgainError, load_model, predict_rows
from mnistsum_ray.cluster import resources
from mnistsum_ray.scoring import job
from tests.integration.conftest import Result, metrics_of, score_here
from tests.jobs import wait_until

pytestmark = pytest.mark.usefixtures("cluster")

FILES, ROWS = 3, 715  # every fifth row is bad in one of four ways
BAD = ROWS // 5
WAYS: list[dict[str, Any]] = [
    {"image": None},
    {"image": b"no"},
    {"number": 10},
    {"number": -1, "image": None},
]
BAD_FILES = {
    "column.parquet": "has a column 'Reason', which scoring would add; rename it",
    "empty.parquet": "is not Parquet, or was cut off",
    "flags.parquet": "column 'number' has type bool, which holds no whole numbers",
    "footer.parquet": "is not Parquet, or was cut off",
    "missing.parquet": "has no column 'number' but",
    "pages.parquet": "cannot be read",
    "shape.parquet": "which holds no images",
}
DAYS = [datetime(1970, 1, 1), datetime(9999, 12, 31), None]
KINDS = {"image": pa.binary(), "number": pa.int16(), "day": pa.timestamp("us")}


def rows_of(sample: pa.Table, file: int) -> pa.Table:
    images = sample["image"].take(pa.array((np.arange(ROWS) * 7 + file) % 5000)).to_pylist()
    rows: list[dict[str, Any]] = []
    for row, image in enumerate(images):
        rows.append({"image": image, "number": row % 10, "day": DAYS[row % 3]})
        if row % 5 == 0:
            rows[row] |= WAYS[row // 5 % len(WAYS)]
    return pa.Table.from_pylist(rows, pa.schema(KINDS))


@pytest.fixture(scope="module")
def source(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FILES files with bad rows, and BAD_FILES."""
    folder = tmp_path_factory.mktemp("source") / "in"
    folder.mkdir()
    for file in range(FILES):
        path, table = folder / f"{file:02}.parquet", rows_of(sample, file)
        # As Spark writes days.
        pq.write_table(table, path, row_group_size=100, use_deprecated_int96_timestamps=True)
    whole = path.read_bytes()
    (folder / "control\x1b[2J.parquet").write_bytes(whole)
    (folder / "empty.parquet").touch()
    (folder / "footer.parquet").write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    middle = len(whole) // 2
    (folder / "pages.parquet").write_bytes(whole[:4] + bytes(middle - 4) + whole[middle:])
    tables = {
        "column": table.append_column("Reason", table["day"]),
        "flags": table.set_column(1, "number", table["number"].cast(pa.bool_())),
        "missing": table.drop_columns(["number"]),
        "shape": pa.table({"image": [{"data": [0] * 784, "shape": 784}], "number": [1]}),
    }
    for name, bad in tables.items():
        pq.write_table(bad, folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def scored(model: Path, source: Path) -> Result:
    settings = {"num_workers": 2, "batch_size": 20, "max_rows_per_file": 300}
    output = source.parent / "Ergebnisse–müller" / "結果"  # noqa: RUF001
    return score_here(model, output, source, **settings)


def test_counts_add_up_and_every_bad_file_is_named_with_its_reason(scored: Result) -> None:
    line, output = scored.line, Path(scored.line["output"])
    rows = {f"{kind}_rows" for kind in ("input", "scored", "rejected", "failed", "resumed")}
    assert line.keys() == {"output", "files", "failed_files", "rows_per_second", "seconds"} | rows
    assert (line["files"], line["failed_files"]) == (FILES + len(BAD_FILES), len(BAD_FILES))
    assert (line["scored_rows"], line["rejected_rows"]) == (FILES * (ROWS - BAD), FILES * BAD)
    assert line["input_rows"] - line["failed_rows"] == FILES * ROWS
    files = {row["file"]: row for row in pq.read_table(output / "files.parquet").to_pylist()}
    for name, reason in BAD_FILES.items():
        assert files[name]["status"] == "failed"
        assert reason in files[name]["reason"]
        assert f"rejected: {name}: {files[name]['reason']}\n" in scored.said
    assert re.search(r"skipped: 1, such as \S+/control\\x1b\[2J.parquet \(", scored.said)
    assert "columns whose type changes in the output: day (INT96); " in scored.said
    page = (output / "report.html").read_text()
    assert page.replace("\n", "").isprintable(), "a terminal would obey control characters"
    assert "the number is 10, not one of 0..9" in page


def test_each_row_is_predicted_or_says_why_not(
    scored: Result, model: Path, sample: pa.Table
) -> None:
    paths = sorted(Path(scored.line["output"], "predictions").iterdir())
    found = pa.concat_tables([pq.read_table(path) for path in paths])
    given = pa.concat_tables([rows_of(sample, file) for file in range(FILES)])
    expected = predict_rows(load_model(model), given).drop_columns(["image"])
    assert found.to_pydict() == expected.to_pydict()


@pytest.mark.nightly
def test_a_busy_cluster_is_waited_for_until_the_time_limit(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_REPORT_SECONDS", 1.0)
    held = placement_group([{"CPU": 2}])
    assert held.wait(30)
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 0)
    said = "^needs 1 CPU, for the first worker, but after 3 s only 0 CPUs and 0 GPUs are free "
    with pytest.raises(TryAgainError, match=said):
        score_here(model, tmp_path / "out", source, wait_seconds=3)
    remove_placement_group(held)
    with monkeypatch.context() as patch:
        patch.setattr(job, "_SILENT_SECONDS", 1.0)  # less than a worker needs to start
        with pytest.raises(TryAgainError, match="no worker has answered for 1 s"):
            score_here(model, tmp_path / "out", source)
    assert score_here(model, tmp_path / "out", source).line["scored_rows"] > 0


@pytest.mark.slow
def test_a_ray_dataset_comes_back_with_predictions(model: Path, sample: pa.Table) -> None:
    """All rows in their order, though the task of the first ones is slow.

    The dataset of the user keeps its own options.
    """
    table = rows_of(sample, 0).append_column("id", pa.array(range(ROWS)))

    def wait_first(block: pa.Table) -> pa.Table:
        time.sleep(0 if block["id"][0].as_py() else 2)
        return block

    blocks = ray.data.from_arrow([table.slice(start, 100) for start in range(0, ROWS, 100)])
    dataset = blocks.map_batches(wait_first, batch_format="pyarrow")
    answered = pa.concat_tables(ray.get(predict_rows(model, dataset).to_arrow_refs()))
    assert not dataset.context.execution_options.preserve_order
    expected = predict_rows(load_model(model), table)
    for name in ("id", "pred_digit", "pred_sum", "consistent", "reason"):
        assert answered[name].to_pylist() == expected[name].to_pylist(), name


def test_prometheus_sees_the_rows(scored: Result) -> None:
    """A process reports every two seconds: see start_cluster."""
    output = scored.line["output"]
    wait_until(lambda: metrics_of(output).get("ray_mnistsum_last_success_seconds"), 30)
    found = metrics_of(output)
    # One more file was planned, whose pages could not be read.
    names = ("rows_total", "planned_rows", "rejected_rows_total", "rejected_files")
    counts = [FILES * ROWS, (FILES + 1) * ROWS, FILES * BAD, len(BAD_FILES)]
    assert [found[f"ray_mnistsum_{name}"] for name in names] == counts
    finished = json.loads((Path(output) / "manifest.json").read_text())["finished"]
    ended = datetime.fromisoformat(finished).timestamp()
    assert 0 <= found["ray_mnistsum_last_success_seconds"] - ended < 60
