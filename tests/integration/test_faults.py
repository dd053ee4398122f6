"""Processes, nodes, storage and disks that fail: what is left is what an undisturbed run leaves.

One cluster of a head and three nodes, and a table of faults for each command; README.md has it in
words.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from mnistsum_ray import RequestError, RunError
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import (
    RAY,
    Job,
    Result,
    Storage,
    add_node,
    descendants,
    history_of,
    joined,
    kill_worker,
    nodes,
    predictions_in,
    score_here,
    train_here,
    wait_for_files,
)

pytestmark = pytest.mark.slow

TRAIN, READ, FINISH, SCORE = "RayTrainWorker", "ReadSteps", "finish_model", "MapBatches(Score)"
"""Parts of the titles of processes."""

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def cluster(s3: Storage) -> Iterator[Cluster]:
    """A head without CPUs and three nodes with one each; this process has joined it."""
    with nodes(0, 1, 1, 1) as started, joined(started):
        yield started


@dataclass
class World:
    """What a fault may touch."""

    cluster: Cluster
    s3: Storage
    place: Location
    """The folder of the runs, or of the output."""

    def checkpoints(self) -> list[str]:
        """Folders of the whole checkpoints of all runs, in their order."""
        paths = [file.path for file in self.place.files() if file.name == "trainer.sha256"]
        return sorted(path.rpartition("/")[0] for path in paths)

    def lose_node(self, *, notice: bool) -> None:
        """Kill a node, with a notice of 2 s as from a cloud or without, and add another."""
        node = self.cluster.list_all_nodes()[-1]
        if notice:
            command = [RAY, "drain-node", "--address", self.cluster.address]
            command += ["--node-id", node.node_id, "--deadline-remaining-seconds", "2"]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            subprocess.run(command, check=True, capture_output=True)
            time.sleep(2)
        self.cluster.remove_node(node, allow_graceful=False)
        add_node(self.cluster)

    def fill(self, left: int) -> None:
        """Leave so many bytes free on the disk."""
        free = os.statvfs(self.place.path)
        filler = bytes(free.f_bavail * free.f_bsize - left)
        Path(self.place.path, ".filler").write_bytes(filler)


Act = Callable[[World], object]
Step = tuple[Act, Act]
"""When, and what is done."""


def during(world: World, run: Callable[[], Result], steps: list[Step]) -> Result:
    """Run a job of this process in a thread, and here each step: wait for its condition, act.

    Not the other way round: a node that is added dies with the thread that has added it.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        for condition, act in steps:
            while not condition(world):
                assert not future.done(), (future.exception(), "it ended before")
                time.sleep(0.05)
            act(world)
        return future.result()


@dataclass
class Fault:
    """What happens to a run, and how it ends."""

    steps: list[Step]
    where: str = "disk"
    error: str = ""
    """What the error says; empty: the run goes on by itself."""


def outlast(fault: Fault, world: World, run: Callable[[], Result], published: str) -> Result:
    """Run, and if that fails as it should, with room on the disk again.

    Until then `published` is not there, the file that says that the run has succeeded.
    """
    if fault.error:
        with pytest.raises(RunError, match=fault.error):
            during(world, run, fault.steps)
        assert not (world.place / published).exists()
        Path(world.place.path, ".filler").unlink()
        return run()
    return during(world, run, fault.steps)


def at_once(_: World) -> bool:
    return True


def kill(title: str, when: Act = at_once) -> Step:
    """Kill a process of this title, as soon as there is one."""

    def is_there(world: World) -> bool:
        titles = descendants(os.getpid()).values()
        return bool(when(world)) and any(title in line for line in titles)

    return is_there, lambda _: kill_worker(os.getpid(), title)


@pytest.fixture
def world(fault: Fault, cluster: Cluster, s3: Storage, tmp_path: Path) -> Iterator[World]:
    """An empty place for the fault that is the parameter: a disk, a small disk or S3."""
    folder = tmp_path / "place"
    folder.mkdir()
    uri = f"s3://bucket/{tmp_path.name}" if fault.where == "s3" else str(folder)
    world = World(cluster, s3, locate(uri, "--output"))
    if fault.where != "small disk":
        yield world
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield world
    subprocess.run(["umount", folder], check=True)


def files_in(place: Location) -> Files:
    """All files below a folder, but for hidden ones and the lock."""
    names = [file.path.removeprefix(f"{place.path}/") for file in place.files()]
    kept = [name for name in names if "/." not in f"/{name}" and not name.endswith("_lock")]
    return {name: bytes((place / name).read_bytes()) for name in kept}


# Training. All that a run draws: numbers, order, distortions, dropout. A worker on each node; from
# three on, a new DDP sums its first gradients in another order.
SETTINGS: dict[str, Any] = {"recipe": "long", "batch_size": 32, "epochs": 3, "num_workers": 3}
SETTINGS |= {"sum_head_steps": 20, "skip_bad_rows": True, "name": "mine"}


@pytest.fixture(scope="module")
def rows(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 1,600 rows, all digits mixed. Every sixteenth digit is 11."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    table = sample.take(pa.array(np.random.default_rng(0).permutation(len(sample))[:1600]))
    digits = pa.array(np.where(np.arange(1600) % 16, table["digit"].to_numpy(), 11))
    pq.write_table(table.set_column(1, "digit", digits), path, row_group_size=300)
    return path


@pytest.fixture(scope="module")
def trained(
    cluster: Cluster, s3: Storage, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Files]:
    """An undisturbed run, and its files in the third epoch, as a killed driver leaves them."""
    world = World(cluster, s3, locate(str(tmp_path_factory.mktemp("whole")), "--storage-path"))
    killed: Files = {}

    def copy(world: World) -> None:
        killed.update(files_in(world.place))

    def run() -> Result:
        return train_here(data=rows, storage_path=world.place.path, **SETTINGS)

    return during(world, run, [(lambda world: len(world.checkpoints()) == 2, copy)]), killed


def resume(place: Location, killed: Files, **settings: Any) -> Callable[[], Result]:
    """Copy the files of the run that was killed to an empty place; return what resumes it there."""
    for name, data in killed.items():
        (place / name).write(data)
    given = {"storage_path": place.display, "name": "mine", "resume": True} | settings
    return lambda: train_here(**given)


def test_rows_that_are_left_out_are_counted(trained: tuple[Result, Files]) -> None:
    whole, _ = trained
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    assert f"left out: 100 of 1,600 rows: rows.parquet: row 0: {reason}" in whole.said
    used = [whole.line["data"][f"{split}_rows"] for split in ("train", "validation", "test")]
    assert sum(used) == 1500
    manifest = locate(whole.line["run"], "--name") / "manifest.json"
    assert manifest.read_json()["data"]["bad_rows"]["reasons"] == {reason: 100}


def saves(world: World) -> bool:
    """A checkpoint was saved beside those of the killed run."""
    return len(world.checkpoints()) >= 3


TRAININGS = {
    "a reader, a worker and the last task are killed, a node is drained and lost": Fault(
        [
            kill(READ),
            (at_once, lambda world: world.lose_node(notice=True)),
            kill(TRAIN, saves),
            kill(FINISH),
        ]
    ),
    # Ray Train stores checkpoints by Arrow, which gives up after 6 s.
    "the store answers 503 for three seconds": Fault(
        [(saves, lambda world: world.s3.overload(3))], where="s3"
    ),
    "the disk is full": Fault(
        [(at_once, lambda world: world.fill(500_000))], where="small disk", error="--resume"
    ),
}


@pytest.mark.parametrize("fault", TRAININGS.values(), ids=TRAININGS.keys())
def test_a_training_gives_the_model_of_an_undisturbed_one(
    fault: Fault, world: World, trained: tuple[Result, Files]
) -> None:
    """The driver was killed in the third epoch, and its last checkpoint is damaged."""
    whole, killed = trained
    run = resume(world.place, killed, max_failures=0 if fault.error else 3)
    last = world.place.at(world.checkpoints()[-1])
    (last / "trainer.safetensors").write(b"")
    attempt = world.place.at(last.path.rpartition("/")[0])
    (attempt / "checkpoint_manager_snapshot.json").write(b"{")  # Ray Train's list of them
    finished = outlast(fault, world, run, "mine/model/model.json")
    if not fault.error:
        assert "cannot be used: trainer.safetensors is incomplete or damaged" in finished.said
        starts = 1 if fault.where == "s3" else 2  # nothing is lost there
        assert finished.said.count("going on after epoch ") >= starts
    assert finished.weights() == whole.weights()
    assert (world.place / "mine/manifest.json").read_json()["status"] == "finished"


def test_other_data_are_refused(trained: tuple[Result, Files], rows: Path, tmp_path: Path) -> None:
    run = resume(locate(str(tmp_path), "--storage-path"), trained[1], data="sample")
    said = rf"^--resume: the data are not those of the run .* from {rows}\); name the same"
    with pytest.raises(RequestError, match=said):
        run()


def test_an_elastic_run_shrinks(cluster: Cluster, s3: Storage, data: Path, tmp_path: Path) -> None:
    """A node of three is lost, and none joins: the run goes on with the workers that are left."""
    world = World(cluster, s3, locate(str(tmp_path), "--storage-path"))
    while ray.available_resources().get("CPU", 0) < 3:  # of the test before
        time.sleep(0.2)
    settings = {"epochs": 5, "num_workers": "1,3", "sum_head_steps": 5, "name": "mine"}
    # Ray waits 30 s for the node that was lost.
    settings |= {"data": data, "storage_path": tmp_path, "wait_seconds": 90}

    def lose(world: World) -> None:
        world.cluster.remove_node(world.cluster.list_all_nodes()[-1], allow_graceful=False)

    try:
        # Of an epoch that is over: Ray Train may not know yet of the checkpoint that is the newest.
        second = (lambda world: len(world.checkpoints()) >= 2, lose)
        during(world, lambda: train_here(**settings), [second])
    finally:
        add_node(cluster)
    workers = [line["workers"] for line in history_of(tmp_path / "mine")]
    assert (len(workers), workers[0], workers[-1]) == (5, 3, 2), workers


# Scoring.
ROWS = 14_400
"""Enough for the job to be running still when something dies."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=6), print)
    return folder


def score_pairs(model: Path, pairs: Path, output: str) -> Result:
    settings = {"max_rows_per_file": 250, "label_column": "digit", "num_workers": 3}
    scored = score_here(model, output, pairs, **settings)
    assert scored.line["scored_rows"] == ROWS
    return scored


@pytest.fixture(scope="module")
def predictions(cluster: Cluster, model: Path, pairs: Path) -> Files:
    """Those of an undisturbed scoring."""
    output = pairs.parent / "out"
    score_pairs(model, pairs, str(output))
    return files_in(locate(str(output), "--output") / "predictions")


def writes(files: int) -> Act:
    """So many files of predictions are there."""
    return lambda world: predictions_in(world.place) >= files


KEPT = "; what is scored is kept, and the same command goes on"
SCORINGS = {
    "a worker is killed, and a node lost without notice": Fault(
        [kill(SCORE, writes(1)), (writes(4), lambda world: world.lose_node(notice=False))]
    ),
    "the store answers 503 for ten seconds": Fault(
        [(writes(1), lambda world: world.s3.overload(10))], where="s3"
    ),
    "the disk is full": Fault(
        [(at_once, lambda world: world.fill(80_000))],
        where="small disk",
        error=f"cannot be written: .*No space left on device.*{KEPT}",
    ),
}


@pytest.mark.parametrize("fault", SCORINGS.values(), ids=SCORINGS.keys())
def test_a_scoring_gives_the_files_of_an_undisturbed_one(
    fault: Fault, world: World, predictions: Files, model: Path, pairs: Path
) -> None:
    def run() -> Result:
        return score_pairs(model, pairs, world.place.display)

    scored = outlast(fault, world, run, "manifest.json")
    assert (scored.line["resumed_rows"] > 0) == bool(fault.error)
    assert files_in(world.place / "predictions") == predictions


def test_a_driver_that_is_killed_or_stopped_loses_nothing(
    cluster: Cluster, predictions: Files, pairs: Path, model: Path, tmp_path: Path
) -> None:
    flags = ["--model", model, "--input", pairs, "--output", tmp_path, "--precision", "fp32"]
    flags += ["--max-rows-per-file", 250, "--label-column", "digit"]
    job = Job("score", *flags, address=cluster.address)
    wait_for_files(job, tmp_path, 1)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    job = Job("score", *flags)  # on a cluster of its own
    wait_for_files(job, tmp_path, 1)
    job.process.send_signal(signal.SIGTERM)
    stopped = job.wait()
    assert not job.left()
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    assert f"stopped by SIGTERM{KEPT}\n" in stopped.err  # Ray may say more after it
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "manifest.json").exists()

    assert score_pairs(model, pairs, str(tmp_path)).line["resumed_rows"] > 0
    assert files_in(locate(str(tmp_path), "--output") / "predictions") == predictions


@pytest.mark.nightly
def test_a_file_that_kills_its_workers_ends_the_run(
    cluster: Cluster, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """A minute of workers that start."""
    deadly = tmp_path / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 5), deadly)
    flags = ["--model", model, "--input", deadly, "--output", tmp_path / "out"]
    flags += ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job("score", *flags, address=cluster.address)
    while job.process.poll() is None:
        for worker in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                opened = [file.path for file in worker.open_files()]
                if str(deadly) in opened and SCORE in " ".join(worker.cmdline()):
                    worker.kill()
    done = job.wait()
    assert done.code == 1
    for said in ("\nerror: workers died again and again (", "; in work were deadly.parquet; "):
        assert said in done.err


@pytest.mark.nightly
def test_a_head_that_is_killed_ends_each_job(
    data: Path,
    model: Path,
    pairs: Path,
    predictions: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a scoring Ray's core ends the process, after 60 s by default."""
    train = ["--data", data, "--storage-path", tmp_path, "--name", "mine", "--epochs", 50]
    with nodes(1) as killed:
        job = Job("train", *train, address=killed.address)
        job.wait_for_line("epoch 2: loss ")
        killed.remove_node(killed.head_node, allow_graceful=False)
        done = job.wait()
    assert done.code == os.EX_TEMPFAIL, done.err
    assert "\nerror: the head of the Ray cluster does not answer; " in done.err
    assert "--name mine --resume" in done.err

    output = tmp_path / "out"
    score = ["--model", model, "--input", pairs, "--output", output, "--precision", "fp32"]
    score += ["--max-rows-per-file", 250, "--label-column", "digit"]
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with nodes(1) as killed:
        job = Job("score", *score, address=killed.address)
        wait_for_files(job, output, 1)
        killed.remove_node(killed.head_node, allow_graceful=False)
        done = job.wait()
    assert (done.code, done.out) == (1, "")
    assert "GCS may have been killed" in done.err
    assert score_pairs(model, pairs, str(output)).line["resumed_rows"] > 0
    assert files_in(locate(str(output), "--output") / "predictions") == predictions
