"""What Prometheus and Ray's dashboard show of jobs, also of jobs that have ended before Prometheus asks."""

import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.data.sources import SAMPLE
from tests.integration.conftest import run_job

pytestmark = pytest.mark.slow

ROWS, REJECTED = 400, 3


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster with a dashboard, to which this process is connected."""
    ray.shutdown()
    yield ray.init(
        address="local",
        include_dashboard=True,
        num_cpus=2,
        log_to_driver=False,
        logging_level="error",
    )
    ray.shutdown()


def metrics(run: Path) -> dict[str, float]:
    """Values of the metrics with this tag, summed over the processes that have reported them."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    token = (Path.home() / ".ray" / "auth_token").read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        if line.startswith("ray_mnistsum") and f'run="{run}"' in line:
            found[re.split(r"[{ ]", line)[0]] += float(line.rsplit(" ", 1)[1])
    return found


def test_a_scoring_that_has_ended(head: Any, model: Path, tmp_path: Path) -> None:
    rows = pq.read_table(SAMPLE)[:ROWS].append_column(
        "number", pa.array([10] * REJECTED + [5] * (ROWS - REJECTED))
    )
    pq.write_table(rows, tmp_path / "in.parquet")
    flags = ("--model", model, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out")
    run_job("score", *flags, address=head.address_info["address"])
    shown = metrics(tmp_path / "out")
    assert (
        shown.items()
        >= {"ray_mnistsum_rows_total": ROWS, "ray_mnistsum_rejected_rows_total": REJECTED}.items()
    )


def test_a_training_that_has_ended(head: Any, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(SAMPLE)[::10], tmp_path / "rows.parquet")
    place = ("--data", tmp_path / "rows.parquet", "--storage-path", tmp_path, "--name", "mine")
    line = run_job(
        "train", *place, "--epochs", 2, "--sum-head-steps", 5, address=head.address_info["address"]
    ).line
    shown = metrics(tmp_path / "mine")
    assert (
        shown.items()
        >= {
            "ray_mnistsum_rows_total": 2 * line["data"]["train_rows"],
            "ray_mnistsum_epoch": 2,
        }.items()
    )
