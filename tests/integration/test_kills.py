"""Processes and nodes that really die: after the same command again, the bytes of an undisturbed run.

Training is killed on S3, on three workers, and scoring on a disk. Each recovers in the way that its storage asks for.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from mnistsum_ray.cluster.tasks import crash_counter
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.reporting.report import epoch_seconds
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.artifacts import read_history
from mnistsum_ray.training.checkpoint import STATE_CARD
from tests.conftest import writable
from tests.integration.conftest import (
    Job,
    Storage,
    descendants,
    joined,
    kill_worker,
    lose_node,
    nodes,
    polling,
    score_here,
    train_here,
    wait_for_files,
    write_shuffled_sample,
)

pytestmark = pytest.mark.slow

ROWS, FILES, PART_ROWS = 28_800, 6, 500
"""Of the input of scoring; 72 rows are bad. There are enough for the job to be running still when its driver is killed."""

SCORE, TRAIN = "ray::MapWorker(MapBatches(Score))", "RayTrainWorker"
"""Titles of workers."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=FILES), print)
    for path in folder.iterdir():
        table = pq.read_table(path)
        numbers = [None if row % 400 == 7 else number for row, number in enumerate(table["number"].to_pylist())]
        pq.write_table(table.set_column(2, "number", pa.array(numbers, pa.int8())), path, row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def many_nodes(s3: Storage) -> Iterator[Cluster]:
    """A head without CPUs and three nodes with one each. Their processes know the S3 server."""
    with nodes(0, 1, 1, 1) as cluster:
        yield cluster


# All that a run draws: numbers, order, distortions, dropout. An epoch has 60 steps of streamed rows. From three workers on, a
# new DDP sums its first gradients in another order.
SETTINGS: dict[str, Any] = {"recipe": "long", "batch_size": 32, "epochs": 3, "sum_head_steps": 500, "shuffle_rows": 900}
SETTINGS |= {"num_workers": 3, "name": "mine"}


def last_checkpoint(run: Location) -> str:
    files = [info.path for info in run.files()]
    return max((Path(path).parent.name for path in files if path.endswith(f"/{STATE_CARD}")), default="")


def wait_for_checkpoint(job: Job, run: Location) -> None:
    before = last_checkpoint(run)
    job.wait_until(lambda: last_checkpoint(run) > before)


def left(run: Location) -> tuple[list[Any], str]:
    """All losses, and the checksum of the weights."""
    losses = [[line["train_loss"], line["step_losses"]] for line in read_history(run)]
    return losses, hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.nightly
@pytest.mark.timeout(1200)  # three starts and two recoveries
def test_a_killed_training_gives_the_model_of_an_undisturbed_one(many_nodes: Cluster, tmp_path: Path) -> None:
    """On S3: a node is drained with notice and lost, the driver killed, and a worker with the sum head."""
    data = write_shuffled_sample(tmp_path / "rows", rows=2400)
    for path in data.iterdir():
        writable("s3://images/kills").write(path.name, path.read_bytes())
    run = locate("s3://runs/killed/mine", "--storage-path")
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    flags += ["--data", "s3://images/kills", "--storage-path", "s3://runs/killed", "--resume", "auto"]
    job = Job("train", *flags, address=many_nodes.address)
    wait_for_checkpoint(job, run)
    lose_node(many_nodes, notice=True)
    job.wait_for_line("going on after epoch")
    wait_for_checkpoint(job, run)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    with joined(many_nodes):
        train_here(data=data, storage_path=tmp_path / "alone", **SETTINGS)
    job = Job("train", *flags, address=many_nodes.address)
    job.wait_for_line("fine-tuning the sum head")
    assert not [title for title in descendants(os.getpid()).values() if "PlacementGroupCleaner" in title]
    kill_worker(os.getpid(), TRAIN)
    job.wait_for_line("going on after epoch")
    done = job.wait()
    assert done.code == 0, done.err
    assert done.err.count("fine-tuning the sum head") == 2
    assert left(run) == left(locate(str(tmp_path / "alone" / "mine"), "--storage-path"))
    manifest = (run / "manifest.json").read_json()
    assert manifest["status"] == "finished"
    assert manifest["training_seconds"] == pytest.approx(sum(map(epoch_seconds, read_history(run))), abs=0.1)


def scored(output: Path) -> dict[str, bytes]:
    """Every file of an output but those with times."""
    timed = ("manifest.json", "report.html", "_lock")
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.timeout(1200)  # four starts
def test_a_killed_scoring_gives_the_files_of_an_undisturbed_one(
    many_nodes: Cluster, pairs: Path, model: Path, tmp_path: Path
) -> None:
    """A worker is killed, a node lost without notice, the driver killed; then it gets a signal.

    Only processes that die alone count towards the three after which a file is given up.
    """
    output, address = tmp_path / "killed", many_nodes.address
    settings: dict[str, Any] = {"max_rows_per_file": PART_ROWS, "label_column": "digit", "precision": None, "num_workers": None}
    with joined(many_nodes):
        score_here(model, tmp_path / "alone", pairs, **settings)

    def start(address: str | None) -> Job:
        flags = ["--input", pairs, "--output", output, "--max-rows-per-file", PART_ROWS, "--label-column", "digit"]
        return Job("score", "--model", model, *flags, address=address)

    job = start(address)
    wait_for_files(job, output, 1)
    kill_worker(os.getpid(), SCORE)
    wait_for_files(job, output, 1)
    lose_node(many_nodes, notice=False)
    wait_for_files(job, output, 1)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    job = start(None)  # on a cluster of its own
    wait_for_files(job, output, 1)
    job.process.send_signal(signal.SIGTERM)
    stopped = job.wait()
    assert not job.left()
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    last = "stopped by SIGTERM; committed files are kept, and the same command resumes"
    assert stopped.err.splitlines()[-1] == last
    assert "Traceback" not in stopped.err
    assert not (output / "manifest.json").exists(), "it marks a finished output"
    with joined(many_nodes):
        done = score_here(model, output, pairs, **settings)
        lost = next(node["NodeID"] for node in ray.nodes() if not node["Alive"])
        here = ray.get_runtime_context().get_node_id()
        with crash_counter() as counter:
            attempts = [ray.get(counter.begin.remote("file", node)) for node in (lost, here, lost, here)]
    assert attempts == [1, 1, 2, 2]
    assert done.line["input_rows"] == done.line["scored_rows"] + done.line["rejected_rows"] == ROWS
    assert (done.line["rejected_rows"], done.line["resumed_rows"] > 0) == (ROWS // 400, True)
    assert scored(output) == scored(tmp_path / "alone")


def test_a_part_that_kills_every_process_is_given_up_and_reported(
    many_nodes: Cluster, model: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    deadly = tmp_path / "in" / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 5), deadly)
    flags = ["--model", model, "--input", deadly.parent, "--output", tmp_path / "out"]
    flags += ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job("score", *flags, address=many_nodes.address)

    def kill_its_readers() -> bool:
        for process, title in descendants(os.getpid()).items():
            with suppress(OSError):  # it has ended
                opened = [os.path.realpath(entry) for entry in Path(f"/proc/{process}/fd").iterdir()]
                if "MapBatches(Score)" in title and str(deadly) in opened:
                    os.kill(process, signal.SIGKILL)
        return False

    with polling(kill_its_readers):
        done = job.wait()
    assert done.code == 0, done.err
    line = done.line
    assert (line["failed_files"], line["scored_rows"], line["failed_rows"]) == (1, 0, ROWS // FILES * 5)
    assert "a process that scored died" in done.err
    assert "its task is begun again at deadly.parquet" in done.err
    assert "cannot be used: deadly.parquet: the process that scored it died 3 times" in done.err
