"""Both jobs on a GPU from the shell: trained twice, killed, resumed on a CPU; scored beside the CPU."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("ray", reason="the jobs need Ray")
import ray

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.training.fetch import load_rows
from mnistsum_ray.training.rows import Batch, TrainingRows
from tests.gpu.conftest import CUDA, two_gpus
from tests.integration.conftest import (
    Done,
    Job,
    kill_worker,
    no_job_is_left,
    report_duration,
    run_job,
    start_cluster,
    wait_for_files,
)

__all__ = ["no_job_is_left"]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SCORED_ROWS = 400_000


def run_on_gpu(*args: object) -> Done:
    done = run_job(*map(str, args))
    assert "GPU worker" in done.err
    return done


def start_on_gpu(line: str, *args: object) -> Job:
    """Start a job whose line on the console that begins so names GPU workers."""
    job = Job(*map(str, args))
    assert "GPU worker" in job.wait_for_line(line)
    return job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The sample's run with seed 0, on the GPU."""
    runs = tmp_path_factory.mktemp("runs")
    return run_on_gpu("train", "--data", "sample", "--seed", 0, "--use-gpu", "true", "--storage-path", runs, "--name", "first")


def test_the_sample_is_learned_and_again(trained: Done, tmp_path: Path) -> None:
    assert trained.line["test"]["digit_accuracy"] > 0.98
    assert trained.line["test"]["sum_accuracy"] > 0.98
    again = run_on_gpu("train", "--data", "sample", "--seed", 0, "--storage-path", tmp_path).line["test"]
    assert again["digit_accuracy"] == pytest.approx(trained.line["test"]["digit_accuracy"], abs=0.01)


@pytest.mark.parametrize("flags", [["--recipe", "long", "--epochs", 3], ["--compile"], ["--precision", "fp32"]], ids=str)
def test_ways_to_train(flags: list[object], tmp_path: Path) -> None:
    done = run_on_gpu("train", "--data", "sample", "--seed", 0, "--storage-path", tmp_path, *flags)
    assert done.line["test"]["digit_accuracy"] > 0.95


@pytest.mark.parametrize(
    "workers",
    ["1", pytest.param("2", marks=two_gpus), pytest.param("1,2", marks=two_gpus)],
    ids=lambda workers: f"{workers} workers",
)
def test_a_killed_worker_is_replaced_and_the_memory_of_the_card_is_free_again(workers: str, tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    flags = ["--data", "sample", "--epochs", 40, "--num-workers", workers, "--storage-path", tmp_path, "--name", "mine"]
    job = start_on_gpu("run mine", "train", *flags)
    job.wait_for_line("epoch 2: loss ")
    kill_worker(job.process.pid, "RayTrainWorker")
    killed = time.monotonic()
    line = job.wait_for_line("going on after epoch")
    assert f"on {workers} workers" in line or workers == "1,2", "elastic: with one, or with both"
    report_duration("training on a GPU, a worker killed: went on", killed)
    done = job.wait()
    assert done.line["test"]["digit_accuracy"] > 0.985
    assert torch.cuda.mem_get_info()[0] > free - 0.01 * total


@two_gpus
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    flags = ["--data", "sample", "--seed", 0, "--precision", "fp32", "--storage-path", tmp_path]
    one, two = (run_on_gpu("train", *flags, "--num-workers", workers) for workers in (1, 2))
    assert "2 GPU workers" in two.err
    losses = [done.history()[0]["train_loss"] for done in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02), "rounding differs, and grows from step to step"
    for head in ("digit", "sum"):
        accuracies = [done.line["test"][f"{head}_accuracy"] for done in (one, two)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)


def test_a_run_begun_on_a_gpu_is_resumed_on_a_cpu(tmp_path: Path) -> None:
    flags = ["--data", "sample", "--epochs", 6, "--precision", "fp32", "--storage-path", tmp_path, "--name", "mine"]
    job = start_on_gpu("run mine", "train", *flags)
    job.wait_for_line("epoch 3: loss ")
    job.kill()
    done = run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume", "--use-gpu", "false")
    assert re.search(r"going on after epoch \d", done.err)
    assert "1 CPU worker" in done.err
    assert done.line["test"]["digit_accuracy"] > 0.985


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=SCORED_ROWS, files=16), print)
    return folder


def score(trained: Done, pairs: Path, output: Path, *flags: object) -> list[object]:
    return ["score", "--model", trained.line["model"], "--input", pairs, "--output", output, *flags]


@pytest.fixture(scope="module")
def scored(trained: Done, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Scored by the GPU, without a disturbance."""
    output = tmp_path_factory.mktemp("scored") / "out"
    assert run_on_gpu(*score(trained, pairs, output, "--use-gpu", "true")).line["scored_rows"] == SCORED_ROWS
    return rows(output)


def rows(output: Path) -> pa.Table:
    files = sorted((output / "predictions").glob("part-*.parquet"))
    return pa.concat_tables([pq.ParquetFile(file).read(["pred_digit", "pred_sum"]) for file in files])


def share_equal(first: pa.Table, second: pa.Table) -> float:
    return min(float(np.mean(first[name].to_numpy() == second[name].to_numpy())) for name in first.column_names)


def test_a_gpu_scores_as_a_cpu(trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path) -> None:
    run_on_gpu(*score(trained, pairs, tmp_path / "gpu", "--precision", "fp32"))
    done = run_job(*map(str, score(trained, pairs, tmp_path / "cpu", "--precision", "fp32", "--use-gpu", "false")))
    assert "GPU worker" not in done.err
    exact = rows(tmp_path / "cpu")
    assert share_equal(rows(tmp_path / "gpu"), exact) >= 0.9999
    assert share_equal(scored, exact) >= 0.999, "bfloat16"


def test_a_killed_actor_and_a_killed_run_change_nothing(trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = score(trained, pairs, output, "--max-rows-per-file", 5_000)
    job = start_on_gpu(f"{SCORED_ROWS:,} rows to score", *flags)
    wait_for_files(job, output, 8)
    kill_worker(job.process.pid, "MapBatches(Score)")
    wait_for_files(job, output, 4)
    job.kill()
    assert run_on_gpu(*flags).line["resumed_rows"] > 0
    assert share_equal(scored, rows(output)) >= 0.9999


def test_int8_goes_to_the_cpus(trained: Done, pairs: Path, tmp_path: Path) -> None:
    done = run_job(*map(str, score(trained, pairs / "part-00000.parquet", tmp_path / "out", "--precision", "int8")))
    assert "CPU worker" in done.err
    assert "GPU worker" not in done.err


@pytest.fixture
def cluster() -> Iterator[None]:
    start_cluster(num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_batches_on_the_gpu_are_those_of_the_cpu() -> None:
    source = open_source("sample")
    data, shuffle = load_rows(source).data, Shuffle(source.train, None, 48, 0, seed=3)

    def batches(device: torch.device) -> list[Batch]:
        return list(TrainingRows(data, shuffle, distortion=1.0, epochs=2, rank=0, world_size=1, device=device).batches())

    for ours, theirs in zip(batches(CUDA), batches(torch.device("cpu")), strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert values.device.type == "cuda"
            assert torch.equal(values.cpu(), theirs[name]), name
