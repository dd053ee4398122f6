"""Processes and nodes that really die: after the same command again, the bytes of an undisturbed run.

Training is killed on S3, on three workers, and scoring on a disk, where two runs may also meet.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.reporting.report import epoch_seconds
from mnistsum_ray.storage.lock import EXPIRED_SECONDS
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.checkpoint import STATE_DIGEST
from tests.integration.conftest import (
    Job,
    Storage,
    descendants,
    history_of,
    joined,
    kill_worker,
    lose_node,
    nodes,
    polling,
    run_job,
    train_here,
    wait_for_files,
    write_shuffled_sample,
)

pytestmark = pytest.mark.slow

ROWS, FILES, PART_ROWS, BAD_ROWS = 28_800, 6, 500, 72
"""Of the input of scoring: enough for the job to be running still when its driver is killed."""

SCORE = "ray::MapWorker(MapBatches(Score))"
"""Title of a worker."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(
        ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=FILES), print
    )
    for path in folder.iterdir():
        table = pq.read_table(path)
        numbers = [
            None if row % 400 == 7 else number
            for row, number in enumerate(table["number"].to_pylist())
        ]
        pq.write_table(
            table.set_column(2, "number", pa.array(numbers, pa.int8())), path, row_group_size=300
        )
    return folder


@pytest.fixture(scope="module")
def many_nodes(s3: Storage) -> Iterator[Cluster]:
    """A head without CPUs and three nodes with one each. Their processes know the S3 server."""
    with nodes(0, 1, 1, 1) as cluster:
        yield cluster


# All that a run draws: numbers, order, distortions, dropout. An epoch has 60 steps. From three
# workers on, a new DDP sums its first gradients in another order.
SETTINGS: dict[str, Any] = {"recipe": "long", "batch_size": 32, "epochs": 3, "sum_head_steps": 500}
SETTINGS |= {"num_workers": 3, "name": "mine"}


def wait_for_checkpoint(job: Job, run: Location) -> None:
    def saved() -> int:
        return sum(file.name == STATE_DIGEST for file in run.files())

    before = saved()
    job.wait_until(lambda: saved() > before)


def left(run: Location | Path) -> tuple[list[Any], str]:
    """All losses, and the checksum of the weights."""
    place = locate(str(run), "--storage-path") if isinstance(run, Path) else run
    losses = [[line["train_loss"], line["step_losses"]] for line in history_of(place)]
    return losses, hashlib.sha256((place / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.nightly
@pytest.mark.timeout(1200)  # three starts and two recoveries
def test_a_killed_training_gives_the_model_of_an_undisturbed_one(
    many_nodes: Cluster, tmp_path: Path
) -> None:
    """On S3: a node is drained with notice and lost, the driver killed, and the task that fine-tunes the sum head."""
    data = write_shuffled_sample(tmp_path / "rows", rows=2400)
    for path in data.iterdir():
        (locate("s3://images/kills", "--data") / path.name).write(path.read_bytes())
    run = locate("s3://runs/killed/mine", "--storage-path")
    flags = [
        word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    flags += [
        "--data",
        "s3://images/kills",
        "--storage-path",
        "s3://runs/killed",
        "--resume",
        "auto",
    ]
    job = Job("train", *flags, address=many_nodes.address)
    wait_for_checkpoint(job, run)
    lose_node(many_nodes, notice=True)
    job.wait_for_line("going on after epoch")
    wait_for_checkpoint(job, run)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()
    free = time.monotonic() + EXPIRED_SECONDS + 1  # of the lock

    with joined(many_nodes):
        train_here(data=data, storage_path=tmp_path / "alone", **SETTINGS)
    time.sleep(max(0.0, free - time.monotonic()))
    job = Job("train", *flags, address=many_nodes.address)
    job.wait_for_line("going on after epoch")
    job.wait_for_line("fine-tuning the sum head")
    kill_worker(os.getpid(), "finish_model")
    done = job.wait()
    assert done.code == 0, done.err
    assert done.err.count("fine-tuning the sum head") == 2
    assert left(run) == left(tmp_path / "alone" / "mine")
    manifest = (run / "manifest.json").read_json()
    assert manifest["status"] == "finished"
    assert manifest["training_seconds"] == pytest.approx(
        sum(map(epoch_seconds, history_of(run))), abs=0.1
    )


def flags_of(model: Path, pairs: Path, output: Path) -> list[Any]:
    flags = ["--model", model, "--input", pairs, "--output", output]
    return [*flags, "--max-rows-per-file", PART_ROWS, "--label-column", "digit"]


def files_of(output: Path) -> dict[str, bytes]:
    """Every file of an output but those with times, and hidden ones that a kill may leave."""
    files = [path for path in output.rglob("[!.]*") if path.is_file()]
    timed = ("manifest.json", "report.html")
    return {
        str(path.relative_to(output)): path.read_bytes() for path in files if path.name not in timed
    }


@pytest.fixture(scope="module")
def alone(many_nodes: Cluster, pairs: Path, model: Path) -> dict[str, bytes]:
    """The files of a run that nothing disturbs."""
    output = pairs.parent / "alone"
    line = run_job("score", *flags_of(model, pairs, output), address=many_nodes.address).line
    assert (line["scored_rows"], line["rejected_rows"]) == (ROWS - BAD_ROWS, BAD_ROWS)
    return files_of(output)


@pytest.mark.timeout(1200)  # four starts
def test_a_killed_scoring_gives_the_files_of_an_undisturbed_one(
    many_nodes: Cluster, alone: dict[str, bytes], pairs: Path, model: Path, tmp_path: Path
) -> None:
    """A worker is killed, a node lost without notice, the driver killed; then it gets a signal."""
    output = tmp_path / "out"
    flags = flags_of(model, pairs, output)
    job = Job("score", *flags, address=many_nodes.address)
    wait_for_files(job, output, 1)
    kill_worker(os.getpid(), SCORE)
    wait_for_files(job, output, 1)
    lose_node(many_nodes, notice=False)
    wait_for_files(job, output, 1)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    job = Job("score", *flags)  # on a cluster of its own
    wait_for_files(job, output, 1)
    job.process.send_signal(signal.SIGTERM)
    stopped = job.wait()
    assert not job.left()
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    # Ray may say more after it.
    assert (
        "\nstopped by SIGTERM; what is scored is kept, and the same command goes on\n"
        in stopped.err
    )
    assert "Traceback" not in stopped.err
    assert not (output / "manifest.json").exists(), "it marks a finished output"

    line = run_job("score", *flags, address=many_nodes.address).line
    assert line["input_rows"] == line["scored_rows"] + line["rejected_rows"] == ROWS
    assert line["resumed_rows"] > 0
    assert files_of(output) == alone


def test_two_runs_at_once_give_the_files_of_one(
    many_nodes: Cluster, alone: dict[str, bytes], pairs: Path, model: Path, tmp_path: Path
) -> None:
    flags = [*flags_of(model, pairs, tmp_path / "out"), "--num-workers", 1]
    jobs = [Job("score", *flags, address=many_nodes.address) for _ in range(2)]
    for done in [job.wait() for job in jobs]:
        assert (done.line["scored_rows"], done.line["rejected_rows"]) == (ROWS - BAD_ROWS, BAD_ROWS)
        assert "rows to score" in done.err, "it came too late"
    assert files_of(tmp_path / "out") == alone


def score_and_kill(
    deadly: Callable[[int], bool], cluster: Cluster, model: Path, folder: Path
) -> str:
    """Score a file while each worker for which the condition holds is killed; return the error."""
    flags = ["--model", model, "--input", folder / "deadly.parquet", "--output", folder / "out"]
    job = Job(
        "score", *flags, "--num-workers", 1, "--max-rows-per-file", 100_000, address=cluster.address
    )

    def kill() -> bool:
        for process, title in descendants(os.getpid()).items():
            with suppress(OSError):  # it has ended
                if SCORE in title and deadly(process):
                    os.kill(process, signal.SIGKILL)
        return False

    with polling(kill):
        done = job.wait()
    assert (done.code, done.out) == (1, "")
    (error,) = [
        line for line in done.err.splitlines() if line.startswith("error: ")
    ]  # Ray may say more after it
    return error


def test_workers_that_die_again_and_again_end_the_run(
    many_nodes: Cluster, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """Of a file in work, and when they start."""
    deadly = tmp_path / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 5), deadly)

    def has_it_open(process: int) -> bool:
        opened = [os.path.realpath(entry) for entry in Path(f"/proc/{process}/fd").iterdir()]
        return str(deadly) in opened

    for condition, in_work in (
        (has_it_open, "in work were deadly.parquet"),
        (bool, "no file was in work yet"),
    ):
        error = score_and_kill(condition, many_nodes, model, tmp_path)
        assert error.startswith("error: workers died again and again (")
        assert (
            f"; {in_work}; give the workers more memory, or take such a file out of --input; what is"
            in error
        )
