"""Both jobs on a GPU from the shell: trained, killed, resumed on a CPU; scored as a CPU scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.mnist.pairs import ExportPairsConfig, export_pairs
from tests.jobs import Done, Job, kill_worker, run_job, scoring, training, wait_for_files

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SAMPLE = Path("sample")
SCORED_ROWS = 400_000


def run_on_gpu(*args: Any) -> Done:
    """Run a job, which must not wait: the card is free."""
    done = run_job(*args, "--use-gpu", "true", "--wait-seconds", 0)
    assert "GPU worker" in done.err
    assert "waiting for" not in done.err
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = run_on_gpu(*training(SAMPLE, tmp_path_factory.mktemp("runs")))
    assert min(done.line["test"][f"{head}_accuracy"] for head in ("digit", "sum")) > 0.98
    return done


def test_a_run_that_loses_a_worker_and_is_killed_on_a_gpu_is_resumed_on_a_cpu(
    tmp_path: Path,
) -> None:
    job = Job(*training(SAMPLE, tmp_path, "--epochs", 12, "--precision", "fp32"))
    job.wait_for_line("epoch 2: loss ")
    kill_worker(job.process.pid, "RayTrainWorker")
    job.wait_for_line("resuming after epoch")
    job.wait_for_line("epoch 4: loss ")
    job.kill()
    run = ["--storage-path", tmp_path, "--name", "mine"]
    done = run_job("train", *run, "--resume", "--use-gpu", "false")
    assert "resuming after epoch " in done.err
    assert "1 CPU worker" in done.err
    assert done.line["test"]["digit_accuracy"] > 0.985


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    config = ExportPairsConfig(data="sample", output=str(folder), rows=SCORED_ROWS, files=16)
    export_pairs(config, print)
    return folder


def rows(output: Path) -> pa.Table:
    files = sorted((output / "predictions").glob("part-*.parquet"))
    columns = ["pred_digit", "pred_sum"]
    return pa.concat_tables([pq.ParquetFile(file).read(columns) for file in files])


def share_equal(first: pa.Table, second: pa.Table) -> float:
    columns = zip(first.columns, second.columns, strict=True)
    return min(float(np.mean(one.to_numpy() == other.to_numpy())) for one, other in columns)


def test_a_gpu_scores_as_a_cpu_also_after_a_killed_run(
    trained: Done, pairs: Path, tmp_path: Path
) -> None:
    model = Path(trained.line["model"])
    gpu, cpu, killed = (tmp_path / name for name in ("gpu", "cpu", "killed"))
    run_on_gpu(*scoring(model, pairs, gpu, "--precision", "fp32"))
    done = run_job(*scoring(model, pairs, cpu, "--precision", "fp32", "--use-gpu", "false"))
    assert "GPU worker" not in done.err
    assert done.line["scored_rows"] == SCORED_ROWS
    assert share_equal(rows(gpu), rows(cpu)) >= 0.9999

    flags = scoring(model, pairs, killed, "--max-rows-per-file", 5_000)
    job = Job(*flags)
    wait_for_files(job, killed, 8)
    job.kill()
    assert run_on_gpu(*flags).line["resumed_rows"] > 0
    assert share_equal(rows(killed), rows(cpu)) >= 0.999, "bfloat16"
