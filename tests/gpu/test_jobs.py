"""Both jobs on a GPU from the shell: trained, killed, resumed on a CPU; scored as a CPU scores.

Figures are printed: `pytest -m gpu -s`.
"""

import json
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
from tests.gpu.conftest import two_gpus
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


def run_on_gpu(*args: Any) -> Done:
    """Run a job, which must not wait: the card is free."""
    done = run_job(*args, "--use-gpu", "true", "--wait-seconds", 0)
    assert "GPU worker" in done.err
    assert "waiting for" not in done.err
    return done


def flags_of(runs: Path, **settings: object) -> list[object]:
    """Flags of a training on the sample with seed 0, whose run is `mine`."""
    flags: list[object] = ["--data", "sample", "--seed", 0, "--storage-path", runs]
    for name, value in {"name": "mine", **settings}.items():
        flags += [f"--{name.replace('_', '-')}", value]
    return flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run_on_gpu("train", *flags_of(tmp_path_factory.mktemp("runs")))


def test_the_sample_is_learned_and_again(trained: Done, tmp_path: Path) -> None:
    first = trained.line["test"]
    assert min(first["digit_accuracy"], first["sum_accuracy"]) > 0.98
    again = run_on_gpu("train", *flags_of(tmp_path)).line["test"]
    assert again["digit_accuracy"] == pytest.approx(first["digit_accuracy"], abs=0.01)


@pytest.mark.parametrize("workers", ["1", pytest.param("1,2", marks=two_gpus)])
def test_a_killed_worker_is_replaced_and_the_memory_of_the_card_is_free_again(
    workers: str, tmp_path: Path
) -> None:
    free, total = torch.cuda.mem_get_info()
    job = Job("train", *flags_of(tmp_path, epochs=40, num_workers=workers))
    job.wait_for_line("epoch 2: loss ")
    kill_worker(job.process.pid, "RayTrainWorker")
    job.wait_for_line("going on after epoch")
    done = job.wait()
    assert "GPU worker" in done.err
    assert done.line["test"]["digit_accuracy"] > 0.985
    assert torch.cuda.mem_get_info()[0] > free - 0.01 * total


def test_the_job_is_as_fast_as_the_bare_loop(pairs: Path) -> None:
    line = run_job("benchmark", "train", "--data", pairs, "--rows", 120_000).line
    print(json.dumps(line))
    assert line["rows_per_second"]["project"] >= 0.9 * line["rows_per_second"]["bare"]


@two_gpus
def test_two_cards_train_as_one(tmp_path: Path) -> None:
    """Rounding differs, and grows from step to step."""
    flags = [flags_of(tmp_path / str(n), num_workers=n, precision="fp32") for n in (1, 2)]
    one, two = (run_on_gpu("train", *each) for each in flags)
    assert "2 GPU workers" in two.err
    losses = [history_of(done.line["run"])[0]["train_loss"] for done in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    for head in ("digit", "sum"):
        accuracies = [done.line["test"][f"{head}_accuracy"] for done in (one, two)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)


def test_a_run_begun_on_a_gpu_is_resumed_on_a_cpu(tmp_path: Path) -> None:
    job = Job("train", *flags_of(tmp_path, epochs=6, precision="fp32"))
    job.wait_for_line("epoch 3: loss ")
    job.kill()
    run = ["--storage-path", tmp_path, "--name", "mine"]
    done = run_job("train", *run, "--resume", "--use-gpu", "false")
    assert "going on after epoch " in done.err
    assert "1 CPU worker" in done.err
    assert done.line["test"]["digit_accuracy"] > 0.985


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    config = ExportPairsConfig(data="sample", output=str(folder), rows=SCORED_ROWS, files=16)
    export_pairs(config, print)
    return folder


def score(trained: Done, pairs: Path, output: Path, *flags: object) -> list[Any]:
    return ["score", "--model", trained.line["model"], "--input", pairs, "--output", output, *flags]


def rows(output: Path) -> pa.Table:
    files = sorted((output / "predictions").glob("part-*.parquet"))
    columns = ["pred_digit", "pred_sum"]
    return pa.concat_tables([pq.ParquetFile(file).read(columns) for file in files])


@pytest.fixture(scope="module")
def scored(trained: Done, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Scored by the GPU, without a disturbance."""
    output = tmp_path_factory.mktemp("scored") / "out"
    assert run_on_gpu(*score(trained, pairs, output)).line["scored_rows"] == SCORED_ROWS
    return rows(output)


def share_equal(first: pa.Table, second: pa.Table) -> float:
    columns = zip(first.columns, second.columns, strict=True)
    return min(float(np.mean(one.to_numpy() == other.to_numpy())) for one, other in columns)


def test_a_gpu_scores_as_a_cpu(
    trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path
) -> None:
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    run_on_gpu(*score(trained, pairs, gpu, "--precision", "fp32"))
    done = run_job(*score(trained, pairs, cpu, "--precision", "fp32", "--use-gpu", "false"))
    assert "GPU worker" not in done.err
    assert share_equal(rows(gpu), rows(cpu)) >= 0.9999
    assert share_equal(scored, rows(cpu)) >= 0.999, "bfloat16"


def test_a_killed_actor_and_a_killed_run_change_nothing(
    trained: Done, pairs: Path, scored: pa.Table, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = score(trained, pairs, output, "--max-rows-per-file", 5_000)
    job = Job(*flags)
    wait_for_files(job, output, 8)
    kill_worker(job.process.pid, "MapBatches(Score)")
    wait_for_files(job, output, 4)
    job.kill()
    assert run_on_gpu(*flags).line["resumed_rows"] > 0
    assert share_equal(scored, rows(output)) >= 0.9999
