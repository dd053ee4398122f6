"""Both jobs on a GPU from the shell: trained twice, killed, resumed on a CPU; scored beside the CPU."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("ray", reason="the jobs need Ray")

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from tests.gpu.conftest import report, two_gpus
from tests.integration.conftest import (
    Done,
    Job,
    history_of,
    kill_worker,
    no_job_is_left,
    run_job,
    wait_for_files,
)

__all__ = ["no_job_is_left"]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SCORED_ROWS = 400_000

FIRST = ["--use-gpu", "true", "--wait-seconds", 0]
"""A free card is not waited for."""


def run_on_gpu(*args: Any) -> Done:
    done = run_job(*args)
    assert "GPU worker" in done.err
    assert "waiting for" not in done.err, "the card is free"
    return done


def start_on_gpu(line: str, *args: Any) -> Job:
    """Start a job whose line on the console that begins so names GPU workers."""
    job = Job(*args)
    assert "GPU worker" in job.wait_for_line(line)
    return job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The sample's run with seed 0, on the GPU."""
    runs = tmp_path_factory.mktemp("runs")
    return run_on_gpu(
        "train", "--data", "sample", "--seed", 0, *FIRST, "--storage-path", runs, "--name", "first"
    )


def test_the_sample_is_learned_and_again(trained: Done, tmp_path: Path) -> None:
    assert trained.line["test"]["digit_accuracy"] > 0.98
    assert trained.line["test"]["sum_accuracy"] > 0.98
    again = run_on_gpu("train", "--data", "sample", "--seed", 0, "--storage-path", tmp_path).line[
        "test"
    ]
    assert again["digit_accuracy"] == pytest.approx(
        trained.line["test"]["digit_accuracy"], abs=0.01
    )


@pytest.mark.parametrize(
    "workers",
    ["1", pytest.param("2", marks=two_gpus), pytest.param("1,2", marks=two_gpus)],
    ids=lambda workers: f"{workers} workers",
)
def test_a_killed_worker_is_replaced_and_the_memory_of_the_card_is_free_again(
    workers: str, tmp_path: Path
) -> None:
    free, total = torch.cuda.mem_get_info()
    flags = [
        "--data",
        "sample",
        "--epochs",
        40,
        "--num-workers",
        workers,
        "--storage-path",
        tmp_path,
        "--name",
        "mine",
    ]
    job = start_on_gpu("run mine", "train", *flags)
    job.wait_for_line("epoch 2: loss ")
    kill_worker(job.process.pid, "RayTrainWorker")
    killed = time.monotonic()
    line = job.wait_for_line("going on after epoch")
    assert f"on {workers} worker" in line or workers == "1,2", "elastic: with one, or with both"
    report("a worker killed", seconds_until_it_went_on=time.monotonic() - killed)
    done = job.wait()
    assert done.line["test"]["digit_accuracy"] > 0.985
    assert torch.cuda.mem_get_info()[0] > free - 0.01 * total


def test_the_job_is_as_fast_as_the_bare_loop(pairs: Path) -> None:
    ways = run_job("benchmark", "train", "--data", pairs, "--rows", 120_000).line["ways"]
    for way, figures in ways.items():
        report(f"benchmark train, {way}", **figures)
    assert ways["project"]["rows_per_second"] >= 0.9 * ways["bare"]["rows_per_second"]


@two_gpus
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    flags = ["--data", "sample", "--seed", 0, "--precision", "fp32", "--storage-path", tmp_path]
    one, two = (run_on_gpu("train", *flags, "--num-workers", workers) for workers in (1, 2))
    assert "2 GPU workers" in two.err
    losses = [history_of(done.line["run"])[0]["train_loss"] for done in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02), (
        "rounding differs, and grows from step to step"
    )
    for head in ("digit", "sum"):
        accuracies = [done.line["test"][f"{head}_accuracy"] for done in (one, two)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)


def test_a_run_begun_on_a_gpu_is_resumed_on_a_cpu(tmp_path: Path) -> None:
    flags = [
        "--data",
        "sample",
        "--epochs",
        6,
        "--precision",
        "fp32",
        "--storage-path",
        tmp_path,
        "--name",
        "mine",
    ]
    job = start_on_gpu("run mine", "train", *flags)
    job.wait_for_line("epoch 3: loss ")
    job.kill()
    done = run_job(
        "train", "--storage-path", tmp_path, "--name", "mine", "--resume", "--use-gpu", "false"
    )
    assert re.search(r"going on after epoch \d", done.err)
    assert "1 CPU worker" in done.err
    assert done.line["test"]["digit_accuracy"] > 0.985


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(
        ExportPairsConfig(data="sample", output=str(folder), rows=SCORED_ROWS, files=16), print
    )
    return folder


def score(trained: Done, pairs: Path, output: Path, *flags: object) -> list[Any]:
    return ["score", "--model", trained.line["model"], "--input", pairs, "--output", output, *flags]


@pytest.fixture(scope="module")
def scored(trained: Done, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Scored by the GPU, without a disturbance."""
    output = tmp_path_factory.mktemp("scored") / "out"
    assert (
        run_on_gpu(*score(trained, pairs, output, "--use-gpu", "true")).line["scored_rows"]
        == SCORED_ROWS
    )
    return rows(output)


def rows(output: Path) -> pa.Table:
    files = sorted((output / "predictions").glob("part-*.parquet"))
    return pa.concat_tables(
        [pq.ParquetFile(file).read(["pred_digit", "pred_sum"]) for file in files]
    )


def share_equal(first: pa.Table, second: pa.Table) -> float:
    return min(
        float(np.mean(first[name].to_numpy() == second[name].to_numpy()))
        for name in first.column_names
    )


def test_a_gpu_scores_as_a_cpu(
    trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path
) -> None:
    run_on_gpu(*score(trained, pairs, tmp_path / "gpu", "--precision", "fp32"))
    done = run_job(
        *score(trained, pairs, tmp_path / "cpu", "--precision", "fp32", "--use-gpu", "false")
    )
    assert "GPU worker" not in done.err
    exact = rows(tmp_path / "cpu")
    assert share_equal(rows(tmp_path / "gpu"), exact) >= 0.9999
    assert share_equal(scored, exact) >= 0.999, "bfloat16"


def test_a_killed_actor_and_a_killed_run_change_nothing(
    trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = score(trained, pairs, output, "--max-rows-per-file", 5_000)
    job = start_on_gpu(f"{SCORED_ROWS:,} rows to score", *flags)
    wait_for_files(job, output, 8)
    kill_worker(job.process.pid, "MapBatches(Score)")
    wait_for_files(job, output, 4)
    job.kill()
    assert run_on_gpu(*flags).line["resumed_rows"] > 0
    assert share_equal(scored, rows(output)) >= 0.9999


@pytest.mark.parametrize("processes", [1, 4, 8])
def test_processes_share_a_card(processes: int, trained: Done, pairs: Path, tmp_path: Path) -> None:
    """Each has 4 GiB of it: what it takes at most."""
    free, _ = torch.cuda.mem_get_info()
    flags = score(
        trained, pairs, tmp_path / "out", "--label-column", "digit", "--num-workers", processes
    )
    job, least = Job(*flags), free
    while job.process.poll() is None:
        least = min(least, torch.cuda.mem_get_info()[0])
        time.sleep(0.05)
    each = (free - least) / processes / 2**30
    report(
        f"scoring by {processes} processes",
        rows_per_second=job.wait().line["rows_per_second"],
        gib_each=each,
    )
    assert each < 4
