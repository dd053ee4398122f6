"""A job on a cluster: CPUs that others hold, GPUs that PyTorch cannot use, metrics."""

import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from mnistsum_ray import TrainConfig, fit
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.errors import RequestError, TryAgainError
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import run_job, score_here, start_cluster, train_here


@pytest.mark.usefixtures("cluster")
def test_busy_cpus_are_waited_for_until_the_time_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = placement_group([{"CPU": 2}])
    assert held.wait(30)
    said = r"^needs 0.75 CPUs, but after 3 s only 0 CPUs and 0 GPUs are free"
    with pytest.raises(TryAgainError, match=said):
        fit(TrainConfig(data="sample", storage_path=str(tmp_path), wait_seconds=3))
    remove_placement_group(held)
    assert "waiting for 0.75 CPUs; only 0 CPUs" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA here")
@pytest.mark.slow
def test_without_cuda_a_job_runs_on_cpus_and_says_so(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Ray counts a GPU on a Mac, and where PyTorch is a CPU build."""
    ray.shutdown()
    start_cluster(num_cpus=2, num_gpus=1)
    said = r"^--use-gpu true: Ray counts GPUs on node .*, but PyTorch has no CUDA there; install"
    with pytest.raises(RequestError, match=said):
        train_here(data=data, storage_path=tmp_path, use_gpu=True, wait_seconds=0)
    scored = score_here(model, tmp_path / "out", data, number_column="digit")
    assert scored.line["scored_rows"] == 1000
    assert scored.said.count("running on CPUs: Ray counts GPUs on node ") == 1
    assert "1 CPU worker" in scored.said
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


@pytest.mark.slow
def test_prometheus_sees_jobs_that_have_ended(data: Path, tmp_path: Path) -> None:
    ray.shutdown()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    head = ray.init(address="local", include_dashboard=True, num_cpus=2, **quiet)
    address = head.address_info["address"]
    export_pairs(ExportPairsConfig(data="sample", output=str(tmp_path / "in"), rows=400), print)
    flags = ["--data", data, "--storage-path", tmp_path, "--name", "mine"]
    flags += ["--epochs", 2, "--sum-head-steps", 5]
    line = run_job("train", *flags, address=address).line
    rows = 2 * line["data"]["train_rows"]
    # Ray keeps counters as long as the node lives, and gauges for 20 s.
    assert metrics(tmp_path / "mine")["ray_mnistsum_rows_total"] == rows
    flags = ["--model", tmp_path / "mine", "--input", tmp_path / "in", "--output", tmp_path / "out"]
    run_job("score", *flags, "--number-column", "row_id", address=address)
    shown = metrics(tmp_path / "out")
    rejected = shown["ray_mnistsum_rejected_rows_total"]
    assert shown["ray_mnistsum_rows_total"] == 400
    assert 0 < rejected <= 400, "row ids are seldom numbers in 0..9"
    ray.shutdown()
