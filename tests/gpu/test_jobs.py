"""Both jobs on a GPU from the shell: trained twice, killed, resumed on a CPU; scored beside the CPU."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("ray", reason="the jobs need Ray")
import ray
import ray.train.torch

from mnistsum_ray.config import ExportPairsConfig, TrainConfig
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.data.sources import SAMPLE, open_source
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.training.fetch import load_rows
from mnistsum_ray.training.preflight import preflight
from mnistsum_ray.training.rows import Batch, TrainingRows
from mnistsum_ray.training.trainer import EpochCounter, Trainer
from mnistsum_ray.training.worker import EventSender, Worker
from tests.gpu.conftest import CUDA, report, two_gpus
from tests.integration.conftest import (
    Done,
    Job,
    descendants,
    history_of,
    kill_worker,
    no_job_is_left,
    run_job,
    start_cluster,
    wait_for_files,
    write_shuffled_sample,
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
    return run_on_gpu("train", "--data", "sample", "--seed", 0, *FIRST, "--storage-path", runs, "--name", "first")


def test_the_sample_is_learned_and_again(trained: Done, tmp_path: Path) -> None:
    assert trained.line["test"]["digit_accuracy"] > 0.98
    assert trained.line["test"]["sum_accuracy"] > 0.98
    again = run_on_gpu("train", "--data", "sample", "--seed", 0, "--storage-path", tmp_path).line["test"]
    assert again["digit_accuracy"] == pytest.approx(trained.line["test"]["digit_accuracy"], abs=0.01)


@pytest.mark.parametrize("flags", [["--recipe", "long", "--epochs", 3], ["--precision", "fp32"]], ids=str)
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
    assert f"on {workers} worker" in line or workers == "1,2", "elastic: with one, or with both"
    report("a worker killed", seconds_until_it_went_on=time.monotonic() - killed)
    done = job.wait()
    assert done.line["test"]["digit_accuracy"] > 0.985
    assert torch.cuda.mem_get_info()[0] > free - 0.01 * total


def test_streamed_rows_go_on_and_train_the_same_again(tmp_path: Path) -> None:
    data = write_shuffled_sample(tmp_path / "rows")
    flags = ["--data", data, "--epochs", 12, "--shuffle-rows", 1500, "--storage-path", tmp_path]
    job = start_on_gpu("run mine", "train", *flags, "--name", "mine")
    job.wait_for_line("epoch 3: loss ")
    job.kill()
    done = run_on_gpu("train", "--storage-path", tmp_path, "--name", "mine", "--resume")
    assert re.search(r"going on after epoch \d", done.err)
    again = run_on_gpu("train", "--config", tmp_path / "mine" / "config.yaml", "--storage-path", tmp_path, "--name", "again")
    first, second = (history_of(run.line["run"]) for run in (done, again))
    assert first[0]["train_loss"] == pytest.approx(second[0]["train_loss"], rel=0.05), "a card's sums are in no order"
    assert min(run.line["test"]["digit_accuracy"] for run in (done, again)) > 0.97


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120,000 labelled rows as Parquet."""
    folder = tmp_path_factory.mktemp("many") / "rows"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=120_000, files=8), print)
    return folder


def test_the_job_is_as_fast_as_the_bare_loop(many_rows: Path) -> None:
    ways = run_job("benchmark", "train", "--data", many_rows, "--rows", 120_000).line["ways"]
    for way, figures in ways.items():
        report(f"benchmark train, {way}", **figures)
    assert ways["project"]["rows_per_second"] >= 0.9 * ways["bare"]["rows_per_second"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_of_the_trainer_waits_for_the_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its counters, on rows that Ray Data prepares."""
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model, **_: model)
    run = preflight(TrainConfig(data="sample", recipe="long"))
    worker = Worker(0, 1, CUDA, 1, EventSender(None, rank=1))
    trainer = Trainer(run.hyperparameters, worker, precision)
    counter = EpochCounter(99, CUDA)
    data = load_rows(run.source, streamed=False).data
    batches = TrainingRows(data, run.shuffle, 1.0, epochs=1, rank=0, world_size=1, device=CUDA).batches()
    torch.cuda.set_sync_debug_mode("default")
    for step in range(18):
        batch = next(batches)
        if step == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            counter.add(batch, trainer._step(batch, 0, step, len(batch["digit"]), 0.01))
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variable", ["uuid", "-1", "noset"])
def test_the_environment_says_which_card(variable: str, trained: Done, pairs: Path, tmp_path: Path) -> None:
    name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    environment = {
        "uuid": {"CUDA_VISIBLE_DEVICES": name},
        "-1": {"CUDA_VISIBLE_DEVICES": "-1"},
        "noset": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"},
    }[variable]
    flags = ["--data", "sample", "--epochs", 1, "--sum-head-steps", 50, "--storage-path", tmp_path]
    for job in (["train", *flags], score(trained, pairs / "part-00000.parquet", tmp_path / "out")):
        done = run_job(*job, env=environment)
        assert done.code == 0, done.err
        assert ("GPU worker" in done.err) == (variable != "-1")


@two_gpus
def test_two_ranks_and_an_empty_last_share(tmp_path: Path) -> None:
    """The last batch of 3,969 rows has one, so that rank 1 has none; rank 1 leaves the memory of the first card as it is."""
    rows = tmp_path / "rows.parquet"
    pq.write_table(pq.read_table(SAMPLE).slice(0, 4961), rows)
    flags = ["--data", rows, "--batch-size", 64, "--num-workers", 2, "--storage-path", tmp_path]
    assert "2 GPU workers" in run_on_gpu("train", *flags).err


@two_gpus
def test_both_ranks_are_replaced(tmp_path: Path) -> None:
    """Whether the losses are the same to the last bit is in the table: kernels of a card may sum in any order."""
    flags = ["--data", "sample", "--epochs", 6, "--num-workers", 2, "--precision", "fp32", "--storage-path", tmp_path]
    job = start_on_gpu("run mine", "train", *flags, "--name", "mine")
    job.wait_for_line("epoch 2: loss ")
    for worker, title in descendants(job.process.pid).items():
        if "RayTrainWorker" in title:
            os.kill(worker, signal.SIGKILL)
    job.wait_for_line("going on after epoch")
    done, again = job.wait(), run_on_gpu("train", *flags, "--name", "again")
    report("two cards, killed and not", losses=str([history_of(one.line["run"])[-1]["train_loss"] for one in (done, again)]))
    assert min(run.line["test"]["digit_accuracy"] for run in (done, again)) > 0.98


@two_gpus
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    flags = ["--data", "sample", "--seed", 0, "--precision", "fp32", "--storage-path", tmp_path]
    one, two = (run_on_gpu("train", *flags, "--num-workers", workers) for workers in (1, 2))
    assert "2 GPU workers" in two.err
    losses = [history_of(done.line["run"])[0]["train_loss"] for done in (one, two)]
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


def score(trained: Done, pairs: Path, output: Path, *flags: object) -> list[Any]:
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
    done = run_job(*score(trained, pairs, tmp_path / "cpu", "--precision", "fp32", "--use-gpu", "false"))
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


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_share_a_card(processes: int, trained: Done, pairs: Path, tmp_path: Path) -> None:
    """Each has 4 GiB of it: what it takes at most."""
    free, _ = torch.cuda.mem_get_info()
    flags = score(trained, pairs, tmp_path / "out", "--label-column", "digit", "--num-workers", processes)
    job, least = Job(*flags), free
    while job.process.poll() is None:
        least = min(least, torch.cuda.mem_get_info()[0])
        time.sleep(0.05)
    each = (free - least) / processes / 2**30
    report(f"scoring by {processes} processes", rows_per_second=job.wait().line["rows_per_second"], gib_each=each)
    assert each < 4


@pytest.fixture
def cluster() -> Iterator[None]:
    start_cluster(num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_batches_on_the_gpu_are_those_of_the_cpu() -> None:
    source = open_source("sample")
    data, shuffle = load_rows(source, streamed=False).data, Shuffle(source.train, None, 48, 0, seed=3)

    def batches(device: torch.device) -> list[Batch]:
        return list(TrainingRows(data, shuffle, distortion=1.0, epochs=2, rank=0, world_size=1, device=device).batches())

    for ours, theirs in zip(batches(CUDA), batches(torch.device("cpu")), strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert values.device.type == "cuda"
            assert torch.equal(values.cpu(), theirs[name]), name
