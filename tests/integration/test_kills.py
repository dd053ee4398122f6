"""Processes and nodes that really die: after the same command again, the bytes of an undisturbed run.

One matrix: {train, score} x {a disk, S3} x {worker, node, driver, everything}, and a signal to a scoring on a disk. One
undisturbed training, on a disk, is compared with those on both storages.
"""

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from mnistsum_ray.cluster.crash_counter import crash_counter
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model import int8
from mnistsum_ray.reporting.report import epoch_seconds
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.artifacts import read_history
from mnistsum_ray.training.checkpoint import STATE_CARD
from tests.conftest import calibrate, writable
from tests.integration.conftest import (
    Done,
    Job,
    Storage,
    descendants,
    kill_worker,
    lose_node,
    nodes,
    report_duration,
    score_here,
    write_shuffled_sample,
    written_files,
)

pytestmark = pytest.mark.slow

ROWS, FILES, PART_ROWS = 36_000, 6, 500
"""Of the input of scoring; 60 rows are bad."""

TRAIN = ["--recipe", "long", "--batch-size", 32, "--sum-head-steps", 200]
"""With all that a run draws: numbers, order, distortions, dropout. An epoch has 75 steps."""


@dataclass
class Case:
    """A job, and where it writes."""

    name: str
    worker: str
    """Title of its worker processes."""
    flags: list[object]
    """Of the command, which begins and goes on."""
    output: Location

    def start(self, *, address: str | None = None) -> Job:
        """Start the job, or go on with it."""
        return Job(self.name, *self.flags, address=address)

    def progress(self) -> Any:
        """What grows with the work that is saved: the name of the last checkpoint, or the number of scored files."""
        if self.name == "score":
            return written_files(self.output)
        files = [info.path for info in self.output.files()]
        return max((Path(path).parent.name for path in files if path.endswith(f"/{STATE_CARD}")), default="")

    def wait_for_progress(self, job: Job, since: Any) -> None:
        """Wait for three files, or for two checkpoints: Ray Train knows the first when the second is written."""
        for _ in range(3 if self.name == "score" else 2):
            job.wait_until(lambda before=since: self.progress() > before)  # type: ignore[misc]
            since = self.progress()

    def wait_for_recovery(self, job: Job, what: str, since: float) -> None:
        """Wait until a job that is still running goes on."""
        if self.name == "train":
            if "node" in what and self.output.is_local:  # after a notice Ray Train ends the workers, and none fails
                job.wait_for_line("the node 127.0.0.")
            job.wait_for_line("going on after epoch")
        else:
            before = self.progress()
            job.wait_until(lambda: self.progress() != before)
        report_duration(f"{self.name} on {self.output.filesystem.type_name}, {what}: went on", since)


def training_case(root: str, data: str, *, streamed: bool, workers: int = 2) -> Case:
    place = ["--storage-path", root, "--name", "mine"]
    flags = ["--data", data, *TRAIN, "--num-workers", workers, "--checkpoint-seconds", 0.1, "--epochs", 4 if streamed else 3]
    flags += ["--shuffle-rows", 900] if streamed else []
    return Case("train", "RayTrainWorker", [*flags, *place, "--resume", "auto"], locate(root, "--storage-path") / "mine")


def scoring_case(root: str, pairs: str, model: Path) -> Case:
    output = locate(root, "--output") / "mine"
    flags = ["--model", model, "--input", pairs, "--output", output.display, "--max-rows-per-file", PART_ROWS]
    flags += ["--label-column", "digit"]
    return Case("score", "ray::MapWorker(MapBatches(Score))", flags, output)


def left(case: Case) -> dict[str, Any]:
    """What must be the same: the model and all losses of a training; every file of an output but those with times."""
    if case.name == "score":
        timed = ("manifest.json", "report.html", "_lock")
        found = [info.path for info in case.output.files() if info.name not in timed]
        return {path.removeprefix(case.output.path): case.output.at(path).read_bytes() for path in found}
    history = read_history(case.output)
    weights = (case.output / "model" / "model.safetensors").read_bytes()
    return {
        "losses": [[line["train_loss"], line["step_losses"]] for line in history],
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


@pytest.fixture(scope="module")
def two_nodes(s3: Storage) -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each. Their processes know the S3 server."""
    with nodes(0, 1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shuffled_sample(tmp_path_factory.mktemp("data") / "rows", rows=3000)


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
def trained(data: Path, two_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An undisturbed training on a disk, for both storages."""
    case = training_case(str(tmp_path_factory.mktemp("alone")), str(data), streamed=True)
    assert case.start(address=two_nodes.address).wait().code == 0
    return case


def uploaded(folder: Path, uri: str) -> str:
    for path in folder.iterdir():
        writable(uri).write(path.name, path.read_bytes())
    return uri


@pytest.fixture(params=[("train", "disk"), ("train", "S3"), ("score", "disk"), ("score", "S3")], ids=" on ".join)
def cases(
    request: pytest.FixtureRequest, data: Path, pairs: Path, model: Path, tmp_path: Path, s3: Storage, trained: Case
) -> tuple[Case, Case]:
    """The case that is disturbed, and the same undisturbed. Training rows are streamed."""
    name, where = request.param
    roots = [str(tmp_path / which) if where == "disk" else f"s3://runs/{name}-{which}" for which in ("killed", "alone")]
    if name == "train":
        source = str(data) if where == "disk" else uploaded(data, "s3://images/kills")
        one, other = training_case(roots[0], source, streamed=True), trained
    else:
        source = str(pairs) if where == "disk" else uploaded(pairs, "s3://scores/kills/in")
        one, other = (scoring_case(root, source, model) for root in roots)
    return one, other


@contextmanager
def watched(output: Location) -> Iterator[None]:
    """Check while the block runs that every scored file on a disk with a final name is whole."""
    ended, torn = threading.Event(), list[str]()

    def watch() -> None:
        while not ended.wait(0.05):
            for path in Path(output.path).rglob("[!.]*.parquet"):
                try:
                    pq.read_metadata(path)
                except FileNotFoundError:
                    continue
                except Exception as error:  # any error means that the file was not whole
                    torn.append(f"{path}: {error}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert not torn


def finish(case: Case, address: str) -> Done:
    """Go on to the end. The worker of a training on a disk is killed once more, while it fine-tunes the sum head."""
    job = case.start(address=address)
    if case.name == "score" or not case.output.is_local:
        return job.wait()
    job.wait_for_line("fine-tuning the sum head")
    assert not [title for title in descendants(os.getpid()).values() if "PlacementGroupCleaner" in title]
    kill_worker(os.getpid(), case.worker)
    done = job.wait()
    assert done.err.count("fine-tuning the sum head") == 2
    return done


def start_and_lose(case: Case, cluster: Cluster) -> Job:
    """Start a job on the nodes; a worker dies, then a node, and each time it goes on."""
    job, before = case.start(address=cluster.address), case.progress()
    case.wait_for_progress(job, before)
    for what in ("a worker killed", "a node lost and another come"):
        before, began = case.progress(), time.monotonic()
        if what == "a worker killed":
            kill_worker(os.getpid(), case.worker)
        else:
            lose_node(cluster, notice=not case.output.is_local)
        case.wait_for_recovery(job, what, began)
        case.wait_for_progress(job, before)
    return job


@pytest.mark.timeout(1200)  # six starts and two recoveries; four minutes on two cores
def test_whatever_dies_the_bytes_are_those_of_an_undisturbed_run(cases: tuple[Case, Case], two_nodes: Cluster) -> None:
    case, alone = cases
    code = 0 if case.name == "train" else 3
    assert case.name == "train" or alone.start(address=two_nodes.address).wait().code == code
    with watched(case.output) if case.name == "score" and case.output.is_local else nullcontext():
        # On the nodes: a worker dies, then a node, then the driver.
        job = start_and_lose(case, two_nodes)
        os.kill(job.process.pid, signal.SIGKILL)
        job.wait()

        # On a cluster of the job's own: a signal as from a terminal, which is the same for every storage; then everything dies.
        before, began = case.progress(), time.monotonic()
        job = case.start()
        case.wait_for_progress(job, before)
        report_duration(
            f"{case.name} on {case.output.filesystem.type_name}, the driver killed: new work saved by the same command", began
        )
        if case.output.is_local and case.name == "score":
            os.killpg(job.process.pid, signal.SIGTERM)
            check_stopped(job)
            before, job = case.progress(), case.start()
            case.wait_for_progress(job, before)
        job.kill()
        assert (case.output / "manifest.json").exists() == (case.name == "train"), "the manifest marks a finished output"
        done = finish(case, two_nodes.address)
    assert done.code == code, done.err
    if case.name == "score":
        line = done.last_line
        assert line["input_rows"] == line["scored_rows"] + line["rejected_rows"] == ROWS
        assert (line["rejected_rows"], line["resumed_rows"] > 0) == (ROWS // 400, True)
    else:
        manifest, history = (case.output / "manifest.json").read_json(), read_history(case.output)
        assert manifest["status"] == "finished"
        if case.output.is_local:  # to S3, checkpoints within an epoch may come too late for the kills
            assert any(line["seconds_before"] for line in history), "a checkpoint within an epoch knows what its steps took"
        assert manifest["training_seconds"] == pytest.approx(sum(map(epoch_seconds, history)), abs=0.1)
    assert left(case) == left(alone)


@pytest.mark.timeout(600)
def test_three_workers_one_killed_and_one_node_replaced_train_the_model_of_an_undisturbed_run(data: Path, tmp_path: Path) -> None:
    """From three workers on, a new DDP sums its first gradients in another order."""
    case, alone = (training_case(str(tmp_path / name), str(data), streamed=False, workers=3) for name in ("killed", "alone"))
    with nodes(0, 1, 1, 1) as cluster:
        assert start_and_lose(case, cluster).wait().code == alone.start(address=cluster.address).wait().code == 0
    assert left(case) == left(alone)


def check_stopped(job: Job) -> None:
    """A scoring that got SIGTERM has ended, with all its processes, and says how to go on. Of training: test_readme."""
    done = job.wait(timeout=60)
    assert not job.left()
    assert (done.code, done.out) == (128 + signal.SIGTERM, "")
    assert done.err.splitlines()[-1] == "stopped by SIGTERM; committed files are kept, and the same command resumes"
    assert "Traceback" not in done.err


def test_an_attempt_that_ended_with_its_node_costs_no_life(two_nodes: Cluster) -> None:
    """Only processes that die alone count towards the three after which a file is given up."""
    lose_node(two_nodes, notice=False)
    ray.shutdown()  # this process may have joined another cluster
    ray.init(address=two_nodes.address, log_to_driver=False, logging_level="error")
    try:
        while not (dead := [node["NodeID"] for node in ray.nodes() if not node["Alive"]]):
            time.sleep(0.1)  # until the head has noticed it
        lost = dead[0]
        here = ray.get_runtime_context().get_node_id()
        with crash_counter() as counter:
            attempts = [ray.get(counter.begin.remote("file", node)) for node in (lost, here, lost, here)]
    finally:
        ray.shutdown()
    assert attempts == [1, 1, 2, 2]


@pytest.mark.skipif(int8.unavailable_reason() is not None, reason="this PyTorch has no integer convolutions on this CPU")
@pytest.mark.usefixtures("cluster")
def test_a_kill_before_the_last_file_changes_no_bit_with_8_bit_integers(tmp_path: Path, pairs: Path, model: Path) -> None:
    """The last file has two rows, which the undisturbed run predicts in one batch with the rows before them."""
    calibrated = calibrate(Path(shutil.copytree(model, tmp_path / "model")))
    rows = tmp_path / "rows.parquet"
    pq.write_table(pq.read_table(pairs / "part-00000.parquet").slice(0, 1002), rows, row_group_size=100)
    settings: dict[str, Any] = {"max_rows_per_file": 100, "precision": "int8", "num_workers": 1}
    score_here(calibrated, tmp_path / "alone", rows, **settings)
    files = sorted((tmp_path / "alone" / "predictions").iterdir())
    assert pq.read_metadata(files[-1]).num_rows == 2
    shutil.copytree(tmp_path / "alone", tmp_path / "out")
    for path in (tmp_path / "out" / "manifest.json", tmp_path / "out" / "predictions" / files[-1].name):
        path.unlink()
    assert score_here(calibrated, tmp_path / "out", rows, **settings).line["resumed_rows"] > 0
    one, other = (left(Case("score", "", [], locate(str(tmp_path / name), "--output"))) for name in ("out", "alone"))
    assert one == other


def has_open(process: int, file: Path) -> bool:
    """Return whether a process has the file open."""
    with suppress(OSError):
        return any(os.path.realpath(entry) == str(file) for entry in Path(f"/proc/{process}/fd").iterdir())
    return False


def test_a_part_that_kills_every_process_is_given_up_and_reported(model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    deadly = tmp_path / "in" / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 16), deadly)
    flags = ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job("score", "--model", model, "--input", deadly.parent, "--output", tmp_path / "out", *flags)
    while job.process.poll() is None:
        time.sleep(0.05)
        for process, title in descendants(job.process.pid).items():
            if "MapBatches(Score)" in title and has_open(process, deadly):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
    done = job.wait()
    assert done.code == 3, done.err
    assert (done.last_line["failed_files"], done.last_line["scored_rows"]) == (1, 0)
    assert (
        "a process that scored died (out of memory? Ray's logs may tell); its task is begun again at deadly.parquet" in done.err
    )
    assert "cannot be used: deadly.parquet: the process that scored it died 3 times" in done.err
