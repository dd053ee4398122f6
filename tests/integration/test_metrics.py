"""Figures of running jobs in the text that Prometheus reads from a node of the cluster."""

import re
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.reporting.metrics import TrainingMetrics
from tests.integration.conftest import score_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

ROWS, REJECTED = 400, 3
SCORED = ("rows_total", "rejected_rows_total", "rows_per_second")
TRAINED = ("rows_total", "rows_per_second", "epoch", "loss")
REPORT_SECONDS = 80.0
"""Ray's processes report every 10 s, and the agent of the node passes it on."""


def wait_for_metrics(run: str, names: set[str]) -> dict[str, float]:
    """Values of the metrics with this tag, once all of the names are there."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + REPORT_SECONDS
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#") and f'run="{run}"' in line]
        found = {re.split(r"[{ ]", line)[0].removeprefix("ray_"): float(line.rsplit(" ", 1)[1]) for line in lines}
        if names <= {*found}:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(1)


def test_scored_and_trained_rows_are_counted_once(model: Path, tmp_path: Path) -> None:
    metrics = TrainingMetrics("runs/mine")
    event = {"of_rows": 100, "rows_per_second": 20.0, "loss": 0.5}
    for epoch, rows in ((1, 50), (1, 100), (2, 60), (2, 20), (2, 80)):  # in the second epoch a worker died
        metrics.add(event | {"epoch": epoch, "rows": rows})
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=ROWS, files=2), print)
    path = tmp_path / "in" / "part-00001.parquet"
    table = pq.read_table(path)
    numbers = pa.array([None] * REJECTED + table["number"].to_pylist()[REJECTED:], pa.int8())
    pq.write_table(table.set_column(table.column_names.index("number"), "number", numbers), path)
    score_here(model, tmp_path / "out", tmp_path / "in", max_rows_per_file=50)
    scored = wait_for_metrics(str(tmp_path / "out"), {f"mnistsum_score_{name}" for name in SCORED})
    assert (scored["mnistsum_score_rows_total"], scored["mnistsum_score_rejected_rows_total"]) == (ROWS, REJECTED)
    assert scored["mnistsum_score_rows_per_second"] > 0
    assert (
        wait_for_metrics("runs/mine", {f"mnistsum_train_{name}" for name in TRAINED}).items()
        >= {
            "mnistsum_train_rows_total": 180.0,
            "mnistsum_train_rows_per_second": 20.0,
            "mnistsum_train_epoch": 2.0,
            "mnistsum_train_loss": 0.5,
        }.items()
    )
