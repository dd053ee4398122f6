"""Processes, nodes, storage and disks that fail: what is left is what an undisturbed run leaves.

One cluster of a head and three nodes, and a table of faults for each command; README.md has it in
words.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    Bomb,
    Job,
    Scored,
    Step,
    Storage,
    Trained,
    add_node,
    descendants,
    during,
    history_of,
    joined,
    kill_worker,
    nodes,
    predictions_in,
    run_job,
    score_here,
    train_here,
    wait_for_files,
)

pytestmark = pytest.mark.slow

TRAIN, READ, FINISH, SCORE = "RayTrainWorker", "ReadSteps", "finish_model", "MapBatches(Score)"
"""Parts of the titles of processes."""


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
    """The folder of the run, or of the output."""
    bomb: Bomb

    def checkpoints(self) -> list[str]:
        """Paths in the run of the last file of each whole checkpoint, in their order."""
        paths = [file.path for file in self.place.files() if file.name == "trainer.sha256"]
        return sorted(path.partition("/mine/")[2] for path in paths)

    def runs(self, title: str) -> bool:
        return any(title in line for line in descendants(os.getpid()).values())

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


Act = Callable[[World], object]


@dataclass
class Fault:
    """What happens to a run, and how it ends."""

    steps: list[tuple[Act, Act]]
    """When, and what is done."""
    where: str = "disk"
    prepare: Act = bool
    error: str = ""
    """What the error says; empty: the run goes on by itself."""

    def during(self, world: World, run: Callable[[], Any]) -> Any:
        def step(when: Act, act: Act) -> Step:
            return lambda: when(world), lambda: act(world)

        return during(run, *(step(when, act) for when, act in self.steps))


@pytest.fixture
def world(
    request: pytest.FixtureRequest, cluster: Cluster, s3: Storage, tmp_path: Path, bomb: Bomb
) -> Iterator[World]:
    """An empty place for the fault that is the parameter: a disk, a full disk or S3."""
    fault: Fault = request.getfixturevalue("fault")
    folder = tmp_path / "place"
    folder.mkdir()
    uri = f"s3://runs/{tmp_path.name}" if fault.where == "s3" else str(folder)
    world = World(cluster, s3, locate(uri, "--output"), bomb)
    if fault.where != "full disk":
        yield world
        return
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield world
    subprocess.run(["umount", folder], check=True)


def fill(world: World, left: int) -> None:
    """Leave so many bytes free on the disk."""
    folder = Path(world.place.path)
    free = os.statvfs(folder)
    (folder / ".filler").write_bytes(bytes(free.f_bavail * free.f_bsize - left))


def heal(world: World) -> None:
    world.s3.forbidden = ""
    (Path(world.place.path) / ".filler").unlink(missing_ok=True)


# Training. All that a run draws: numbers, order, distortions, dropout. A worker on each node; from
# three on, a new DDP sums its first gradients in another order.
SETTINGS: dict[str, Any] = {"recipe": "long", "batch_size": 32, "epochs": 3, "num_workers": 3}
SETTINGS |= {"sum_head_steps": 20, "skip_bad_rows": True, "name": "mine"}


@pytest.fixture(scope="module")
def rows(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files, all digits mixed. In the third, every fourth digit is 11."""
    folder = tmp_path_factory.mktemp("rows")
    order = np.random.default_rng(0).permutation(len(sample))
    for index in range(4):
        table = sample.take(pa.array(order[index * 400 :][:400]))
        digits = table["digit"].to_numpy().copy()
        if index == 2:
            digits[::4] = 11
        table = table.set_column(1, "digit", pa.array(digits))
        pq.write_table(table, folder / f"{index}.parquet", row_group_size=300)
    return folder


Files = dict[str, bytes]


def files_in(place: Location) -> Files:
    """All files below a folder, but for hidden ones and the lock."""
    names = [file.path.removeprefix(f"{place.path}/") for file in place.files()]
    kept = [name for name in names if "/." not in f"/{name}" and not name.endswith("_lock")]
    return {name: bytes((place / name).read_bytes()) for name in kept}


@pytest.fixture(scope="module")
def trained(
    cluster: Cluster, s3: Storage, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trained, Files]:
    """An undisturbed run, and its files in the third epoch, as a killed driver leaves them."""
    folder = tmp_path_factory.mktemp("whole")
    world = World(cluster, s3, locate(str(folder), "--storage-path"), Bomb(folder / ".bomb"))
    killed: Files = {}
    whole = during(
        lambda: train_here(data=rows, storage_path=folder, **SETTINGS),
        (lambda: len(world.checkpoints()) == 2, lambda: killed.update(files_in(world.place))),
    )
    return whole, killed


def test_rows_that_are_left_out_are_counted_in_manifest_and_report(
    trained: tuple[Trained, Files],
) -> None:
    whole, _ = trained
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    place = "2.parquet: row"
    assert f"left out: 100 of 1,600 rows: {place} 0: {reason} | {place} 4: " in whole.said
    splits = [whole.line["data"][f"{split}_rows"] for split in ("train", "validation", "test")]
    assert sum(splits) == 1500
    run = Path(whole.line["run"])
    manifest = json.loads((run / "manifest.json").read_text())
    bad = manifest["data"]["bad_rows"]
    assert (bad["rows"], bad["reasons"]) == (100, {reason: 100})
    page = (run / "report.html").read_text()
    assert f"<td>100</td><td>{reason}</td><td>2.parquet, row 0" in page


def damage_last_checkpoint(world: World) -> None:
    """And the list that Ray keeps of them. The second epoch is trained again."""
    last = Path(world.checkpoints()[-1]).parent
    (world.place / f"mine/{last}/trainer.safetensors").write(world.bomb.pickled)
    snapshot = world.place / f"mine/{last.parent}/checkpoint_manager_snapshot.json"
    snapshot.write(snapshot.read_bytes()[:50])


def damage_all_checkpoints(world: World) -> None:
    for path in world.checkpoints():
        (world.place / f"mine/{path}").write(b"")


def saves(world: World) -> bool:
    """A checkpoint was saved beside those of the killed run."""
    return len(world.checkpoints()) >= 3


def take_lock(world: World) -> None:
    lock = Path(world.place.path) / "mine" / "_lock"
    lock.unlink()
    lock.write_text("another-run")


TRAININGS = {
    "a reader is killed, a node drained and lost, and the last task killed": Fault(
        [
            (lambda world: world.runs(READ), lambda _: kill_worker(os.getpid(), READ)),
            (lambda _: True, lambda world: world.lose_node(notice=True)),
            (lambda world: world.runs(FINISH), lambda _: kill_worker(os.getpid(), FINISH)),
        ],
        prepare=damage_last_checkpoint,
    ),
    # Ray Train stores checkpoints by Arrow, which gives up after 6 s.
    "the store answers 503 for three seconds": Fault(
        [(saves, lambda world: world.s3.overload(3))], where="s3", prepare=damage_last_checkpoint
    ),
    "a worker is killed": Fault(
        [(saves, lambda _: kill_worker(os.getpid(), TRAIN))], prepare=damage_last_checkpoint
    ),
    "the disk is full": Fault(
        [], where="full disk", prepare=lambda world: fill(world, 500_000), error="--resume"
    ),
    "no checkpoint is whole, and another run takes the lock": Fault(
        [(saves, take_lock)],
        prepare=damage_all_checkpoints,
        error=r"another run has taken the output \(another-run\)",
    ),
}


@pytest.mark.parametrize("fault", TRAININGS.values(), ids=TRAININGS.keys())
def test_a_training_gives_the_model_of_an_undisturbed_one(
    fault: Fault, world: World, trained: tuple[Trained, Files]
) -> None:
    """The driver was killed in the third epoch: `--resume`, and then the fault."""
    whole, killed = trained
    for name, data in killed.items():
        (world.place / name).write(data)
    first = history_of(world.place / "mine")[0]
    fault.prepare(world)
    resume = {"storage_path": world.place.display, "name": "mine", "resume": True}
    if fault.error:
        with pytest.raises(RunError, match=fault.error):
            fault.during(world, lambda: train_here(**resume, max_failures=0))
        assert not (world.place / "mine" / "model").is_folder(), "nothing is published"
        heal(world)
        if fault.steps:  # the lock stays the other's
            again = history_of(world.place / "mine")[0]
            assert again["started"] > first["started"], "trained from the beginning"
            return
        finished = train_here(**resume)
    else:
        finished = fault.during(world, lambda: train_here(**resume))
        assert "cannot be used: trainer.safetensors is incomplete or damaged" in finished.said
        starts = 1 if fault.where == "s3" else 2  # nothing is lost there
        assert finished.said.count("going on after epoch ") >= starts
    assert not world.bomb.mark.exists(), "the pickle was executed"
    assert finished.weights() == whole.weights()
    assert (world.place / "mine/manifest.json").read_json()["status"] == "finished"


def test_other_data_are_refused(trained: tuple[Trained, Files], rows: Path, tmp_path: Path) -> None:
    """A copy of the same rows elsewhere is not."""
    for name, data in trained[1].items():
        locate(str(tmp_path / "runs" / name), "--output").write(data)
    (tmp_path / "rows").mkdir()
    for path in rows.iterdir():
        table = pq.read_table(path).slice(path.name == "0.parquet")
        pq.write_table(table, tmp_path / "rows" / path.name)
    said = rf"^--resume: the data are not those of the run .* from {rows}\); name the same"
    with pytest.raises(RequestError, match=said):
        train_here(storage_path=tmp_path / "runs", name="mine", resume=True, data=tmp_path / "rows")


def test_an_elastic_run_shrinks(cluster: Cluster, s3: Storage, data: Path, tmp_path: Path) -> None:
    """A node of three is lost, and none joins: the run goes on with the workers that are left."""
    place = locate(str(tmp_path), "--storage-path")
    world = World(cluster, s3, place, Bomb(tmp_path / ".bomb"))

    def lose() -> None:
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    while ray.available_resources().get("CPU", 0) < 3:  # of the test before
        time.sleep(0.2)
    settings = {"epochs": 5, "num_workers": "1,3", "sum_head_steps": 5, "name": "mine"}
    settings |= {"data": data, "storage_path": tmp_path}
    # Ray waits 30 s for the node that was lost.
    settings["wait_seconds"] = 90
    try:
        during(lambda: train_here(**settings), (world.checkpoints, lose))
    finally:
        add_node(cluster)
    workers = [line["workers"] for line in history_of(place / "mine")]
    assert len(workers) == 5
    assert (workers[0], workers[-1]) == (3, 2)


# Scoring.
ROWS, BAD_ROWS = 14_400, 36
"""Enough for the job to be running still when something dies."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=6), print)
    for path in folder.iterdir():
        table = pq.read_table(path)
        numbers = table["number"].to_pylist()
        numbers[7::400] = [None] * 6
        column = pa.array(numbers, pa.int8())
        pq.write_table(table.set_column(2, "number", column), path, row_group_size=300)
    return folder


SCORING: dict[str, Any] = {"max_rows_per_file": 250, "label_column": "digit", "num_workers": 3}
TIMED = ("manifest.json", "report.html")


def score_pairs(model: Path, pairs: Path, output: str) -> Scored:
    scored = score_here(model, output, pairs, **SCORING)
    assert (scored.line["scored_rows"], scored.line["rejected_rows"]) == (ROWS - BAD_ROWS, BAD_ROWS)
    return scored


def check_output(output: Location, alone: Files) -> None:
    found = files_in(output)
    assert found.keys() >= {*TIMED}
    assert {name: data for name, data in found.items() if name not in TIMED} == alone


@pytest.fixture(scope="module")
def alone(cluster: Cluster, model: Path, pairs: Path) -> Files:
    """The files of an undisturbed scoring, but those in which times are."""
    output = pairs.parent / "alone"
    score_pairs(model, pairs, str(output))
    files = files_in(locate(str(output), "--output"))
    return {name: data for name, data in files.items() if name not in TIMED}


def writes(files: int) -> Callable[[World], bool]:
    """So many files of predictions are there."""
    return lambda world: predictions_in(world.place) >= files


def forbid_last(world: World) -> None:
    world.s3.forbidden = "part-00005-00009-of-00010.parquet"


KEPT = "; what is scored is kept, and the same command goes on"
SCORINGS = {
    "a worker is killed, and a node lost without notice": Fault(
        [
            (writes(1), lambda _: kill_worker(os.getpid(), SCORE)),
            (writes(4), lambda world: world.lose_node(notice=False)),
        ]
    ),
    "the store answers 503 for ten seconds": Fault(
        [(writes(1), lambda world: world.s3.overload(10))], where="s3"
    ),
    "the store refuses a file": Fault(
        [(writes(1), forbid_last)], where="s3", error=f"part-00005.*cannot be written.*{KEPT}"
    ),
    "the disk is full": Fault(
        [],
        where="full disk",
        prepare=lambda world: fill(world, 80_000),
        error=f"cannot be written: .*No space left on device.*{KEPT}",
    ),
}


@pytest.mark.parametrize("fault", SCORINGS.values(), ids=SCORINGS.keys())
def test_a_scoring_gives_the_files_of_an_undisturbed_one(
    fault: Fault, world: World, alone: Files, model: Path, pairs: Path
) -> None:
    fault.prepare(world)

    def run() -> Scored:
        return score_pairs(model, pairs, world.place.display)

    if fault.error:
        with pytest.raises(RunError, match=fault.error):
            fault.during(world, run)
        assert not (world.place / "manifest.json").exists(), "it marks a finished output"
        heal(world)
        assert run().line["resumed_rows"] > 0
    else:
        fault.during(world, run)
    check_output(world.place, alone)


def flags_of(model: Path, pairs: Path, output: Path) -> list[Any]:
    flags = ["--model", model, "--input", pairs, "--output", output, "--precision", "fp32"]
    return [*flags, "--max-rows-per-file", 250, "--label-column", "digit"]


@pytest.mark.usefixtures("cluster")
def test_a_driver_that_is_killed_or_stopped_loses_nothing(
    cluster: Cluster, alone: Files, pairs: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = flags_of(model, pairs, output)
    job = Job("score", *flags, address=cluster.address)
    wait_for_files(job, output, 1)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    job = Job("score", *flags)  # on a cluster of its own
    wait_for_files(job, output, 1)
    job.process.send_signal(signal.SIGTERM)
    stopped = job.wait()
    assert not job.left()
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    assert f"stopped by SIGTERM{KEPT}\n" in stopped.err  # Ray may say more after it
    assert "Traceback" not in stopped.err
    assert not (output / "manifest.json").exists()

    assert score_pairs(model, pairs, str(output)).line["resumed_rows"] > 0
    check_output(locate(str(output), "--output"), alone)


def test_a_file_that_kills_its_workers_ends_the_run(
    cluster: Cluster, model: Path, pairs: Path, tmp_path: Path
) -> None:
    deadly = tmp_path / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 5), deadly)
    flags = ["--model", model, "--input", deadly, "--output", tmp_path / "out"]
    flags += ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job("score", *flags, address=cluster.address)
    while job.process.poll() is None:
        for process, title in descendants(os.getpid()).items():
            try:
                opened = [
                    os.path.realpath(entry) for entry in Path(f"/proc/{process}/fd").iterdir()
                ]
            except OSError:  # it has ended
                continue
            if SCORE in title and str(deadly) in opened:
                os.kill(process, signal.SIGKILL)
    done = job.wait()
    assert (done.code, done.out) == (1, "")
    # Ray may say more after it.
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: workers died again and again (")
    assert "; in work were deadly.parquet; give the workers more memory, or take such a" in error
    assert error.endswith(KEPT)


def test_a_head_that_is_killed_ends_the_job(
    alone: Files, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's default of 60 s would only make the test longer.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    output = tmp_path / "out"
    with nodes(1) as killed:
        job = Job("score", *flags_of(model, pairs, output), address=killed.address)
        wait_for_files(job, output, 1)
        killed.remove_node(killed.head_node, allow_graceful=False)
        done = job.wait()
        assert done.code == 1, done.err
    done = run_job("score", *flags_of(model, pairs, output))
    assert done.line["resumed_rows"] > 0
    check_output(locate(str(output), "--output"), alone)
