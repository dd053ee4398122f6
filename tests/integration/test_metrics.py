"""What Prometheus and Ray's dashboard show of jobs, also of jobs that have ended before Prometheus asks."""

import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.reporting.metrics import JobMetrics, TrainingMetrics
from tests.integration.conftest import run_job

pytestmark = pytest.mark.slow

ROWS, REJECTED = 400, 3
ENDED = {"jobs_started_total": 1, "jobs_ended_total": 1, "jobs_failed_total": 0, "failed_files_total": 0, "restarts_total": 0}
REPORT_SECONDS = 80.0
"""Ray's processes report every 10 s, and the agent of the node passes it on."""


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster with a dashboard, to which this process is connected."""
    ray.shutdown()
    yield ray.init(address="local", include_dashboard=True, num_cpus=2, log_to_driver=False, logging_level="error")
    ray.shutdown()


def get(url: str) -> str:
    token = (Path.home() / ".ray" / "auth_token").read_text()
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def metrics(run: Path | str) -> dict[str, float]:
    """Values of the metrics with this tag, summed over the processes that have reported them; a phase is one by its name."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    found: dict[str, float] = defaultdict(float)
    for line in get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").splitlines():
        if line.startswith("ray_mnistsum") and f'run="{run}"' in line:
            phase = re.search(r'phase="(\w+)"', line)
            name = phase[1] if phase else re.split(r"[{ ]", line)[0].removeprefix("ray_mnistsum_")
            found[name] += float(line.rsplit(" ", 1)[1])
    return found


def last_job(head: Any) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What the dashboard shows of the job that was started last: its metadata, and the operators of its datasets."""
    job = max(json.loads(get(f"http://{head.dashboard_url}/api/jobs/")), key=lambda job: job["start_time"])
    datasets = json.loads(get(f"http://{head.dashboard_url}/api/data/datasets/{job['job_id']}"))["datasets"]
    names = {data["dataset"].split("_")[0]: [operator["name"] for operator in data["operators"]] for data in datasets}
    return job["metadata"], names


def test_a_scoring_that_has_ended(head: Any, model: Path, tmp_path: Path) -> None:
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=ROWS, files=2), print)
    path = tmp_path / "in" / "part-00001.parquet"
    table = pq.read_table(path)
    numbers = pa.array([None] * REJECTED + table["number"].to_pylist()[REJECTED:], pa.int8())
    pq.write_table(table.set_column(table.column_names.index("number"), "number", numbers), path)
    output = tmp_path / "out"
    flags = ("--model", model, "--input", tmp_path / "in", "--output", output, "--max-rows-per-file", 50)
    assert run_job("score", *flags, address=head.address_info["address"]).code == 3
    shown = metrics(output)
    counters = ENDED | {"rows_total": ROWS, "rejected_rows_total": REJECTED, "rows_expected": ROWS}
    assert shown.items() >= counters.items()
    assert min(shown["rows_per_second"], shown["publishing"]) > 0

    metadata, datasets = last_job(head)
    assert metadata == {"job_name": f"score {output}", "model": str(model), "output": str(output)}
    assert datasets == {"score-files": ["Input", "MapBatches(Score)"]}


def test_a_training_that_has_ended(head: Any, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(SAMPLE)[::10], tmp_path / "rows.parquet")
    place = ("--data", tmp_path / "rows.parquet", "--storage-path", tmp_path, "--name", "mine")
    line = run_job("train", *place, "--epochs", 2, "--sum-head-steps", 5, address=head.address_info["address"]).line
    shown = metrics(tmp_path / "mine")
    rows = 2 * line["data"]["train_rows"]
    assert shown.items() >= (ENDED | {"rows_total": rows, "rows_expected": rows, "epoch": 2}).items()
    assert min(shown["rows_per_second"], shown["loss"], shown["publishing"]) > 0
    assert shown["checkpoint_age_seconds"] < line["seconds"] / 2, "the last epoch's"

    metadata, datasets = last_job(head)
    assert metadata == {"job_name": "train mine", "run": str(tmp_path / "mine")}
    assert datasets == {"load-rows": ["Input", "MapBatches(_read_block)"], "train-rows": ["Input", "MapBatches(ReadRows)"]}
    (run,) = json.loads(get(f"http://{head.dashboard_url}/api/train/v2/runs/v1"))["train_runs"]
    assert (run["name"], run["status"]) == ("mine", "FINISHED")
    assert run["run_settings"]["train_loop_config"]["loop"].startswith("Hyperparameters(epochs=2,")


@pytest.mark.usefixtures("head")
def test_a_job_that_waits_one_that_fails_and_rows_that_are_trained_again() -> None:
    """A gauge that is set once is gone after two reports. What is zero is shown, and a job that is stopped has not failed."""
    with suppress(KeyboardInterrupt), JobMetrics("score", "stopped"):
        raise KeyboardInterrupt
    with suppress(RunError), JobMetrics("score", "failed"):
        raise RunError
    with TrainingMetrics("waits"), TrainingMetrics("again") as training:
        training.expect(200, 0)
        event = {"kind": "progress", "of_rows": 100, "rows_per_second": 20.0, "loss": 0.5}
        for epoch, rows in ((1, 50), (1, 100), (2, 60), (2, 20), (2, 80)):  # in the second epoch a worker died
            training.add(event | {"epoch": epoch, "rows": rows})
        expected = {
            "stopped": {"jobs_ended_total": 1.0, "jobs_failed_total": 0.0},
            "failed": {"jobs_ended_total": 1.0, "jobs_failed_total": 1.0, "rows_total": 0.0, "rejected_rows_total": 0.0},
            "waits": {"jobs_started_total": 1.0, "jobs_ended_total": 0.0, "rows_per_second": 0.0},
            "again": {"rows_total": 180.0, "rows_expected": 200.0, "epoch": 2.0, "loss": 0.5},
        }
        deadline = time.monotonic() + REPORT_SECONDS
        shown: dict[str, dict[str, float]] = {run: {} for run in expected}
        while not all(shown[run].items() >= values.items() for run, values in expected.items()) or shown["waits"]["waiting"] < 25:
            assert time.monotonic() < deadline, shown
            time.sleep(1)
            shown = {run: metrics(run) for run in expected}
