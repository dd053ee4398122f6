"""Processes, nodes, storage and disks that fail: what is left is what an undisturbed run leaves.

A cluster of a head and three nodes; several faults in one run, where they do not hide each other.
README.md has them in words.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from mnistsum_ray import RunError
from mnistsum_ray.data.sources import SPLITS
from mnistsum_ray.mnist.pairs import ExportPairsConfig, export_pairs
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import (
    Result,
    S3Server,
    add_node,
    joined,
    nodes,
    score_here,
    train_here,
)
from tests.jobs import (
    RAY,
    Job,
    descendants,
    history_of,
    kill_worker,
    scoring,
    training,
    wait_for_files,
    wait_until,
)

pytestmark = pytest.mark.slow

TRAIN, SCORE = "RayTrainWorker", "MapBatches(ScoreParts)"
"""Parts of the titles of processes."""


@pytest.fixture(scope="module")
def four_nodes(s3_server: S3Server) -> Iterator[Cluster]:
    """A head without CPUs and three nodes with two each; this process has joined it."""
    with nodes(0, 2, 2, 2) as started, joined(started):
        yield started


def kill(job: Job, title: str) -> None:
    """Kill a process of this title as soon as there is one."""
    job.wait_until(lambda: any(title in line for line in descendants(os.getpid()).values()))
    kill_worker(os.getpid(), title)


def lose_node(cluster: Cluster, *, notice: bool) -> None:
    """Kill a node, with a notice of 2 s as from a cloud or without, and add another."""
    node = cluster.list_all_nodes()[-1]
    if notice:
        command = [RAY, "drain-node", "--address", cluster.address]
        command += ["--node-id", node.node_id, "--deadline-remaining-seconds", "2"]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(2)
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)


# Training. All that a run draws: numbers, order, distortions, dropout. A worker on each node; from
# three on, a new DDP sums its first gradients in another order. One CPU of each node stays free for
# the tasks of Ray Data that read again what was lost with a node.
SETTINGS: dict[str, Any] = {"recipe": "long", "batch_size": 32, "epochs": 3, "name": "mine"}
SETTINGS |= {"num_workers": 3, "threads": 1, "skip_bad_rows": True}

FLAGS: list[Any] = []
for name, value in SETTINGS.items():
    FLAGS += [f"--{name.replace('_', '-')}", value]


@pytest.fixture(scope="module")
def rows(sample: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four files, 800 rows, sorted by digit. Every sixteenth digit is 11."""
    folder = tmp_path_factory.mktemp("rows")
    table = sample.take(pa.array(np.arange(800) * 6))
    digits = pa.array(np.where(np.arange(800) % 16, table["digit"].to_numpy(), 11))
    table = table.set_column(1, "digit", digits)
    for part in range(4):
        pq.write_table(table[200 * part : 200 * (part + 1)], folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    four_nodes: Cluster, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    runs = tmp_path_factory.mktemp("whole")
    return train_here(data=rows, storage_path=runs, **SETTINGS)


def has_checkpoint(runs: Location, epoch: int) -> bool:
    last = f"/epoch_{epoch:05}/trainer.sha256"
    return any(file.path.endswith(last) for file in runs.files())


def wait_for_checkpoint(job: Job, runs: Location, epoch: int) -> None:
    job.wait_until(lambda: has_checkpoint(runs, epoch))


def has_status(runs: Location, status: str) -> bool:
    return bool((runs / "mine/manifest.json").read_json()["status"] == status)


def test_a_training_gives_the_model_of_an_undisturbed_one(
    four_nodes: Cluster, s3_server: S3Server, undisturbed: Result, rows: Path
) -> None:
    """A worker dies at its start, one in an epoch, and the store answers 503 for twenty seconds.

    Where Ray Train gives up, the same command goes on. Rows are left out, and counted.
    """
    runs = locate("s3://bucket/runs", "--storage-path")
    command = training(rows, runs.display, *FLAGS, "--max-failures", 2, "--resume", "auto")
    said: list[str] = []

    def go_on(job: Job, condition: Callable[[], object]) -> Job:
        """Wait for a condition; a job that ends with 75 is started again, as its line says."""
        while not condition():
            if job.process.poll() is not None:
                ended = job.wait()
                assert ended.code == 75, ended.err
                said.append(ended.err)
                job = Job(*command, address=four_nodes.address)
            time.sleep(0.1)
        return job

    job = Job(*command, address=four_nodes.address)
    job.wait_until((runs / "mine/manifest.json").file_entry)  # the rows are read
    kill(job, TRAIN)
    job = go_on(job, lambda: has_checkpoint(runs, 1))
    kill(job, TRAIN)
    job = go_on(job, lambda: has_checkpoint(runs, 2))
    refused = s3_server.refused
    s3_server.overload(20)  # Ray Train stores checkpoints by Arrow, which gives up after 6 s
    job = go_on(job, lambda: has_status(runs, "finished"))
    done = job.wait()
    said.append(done.err)
    assert s3_server.refused > refused
    assert "Ray Train gave up: " in "".join(said)
    assert Result(done.line, done.err).weights() == undisturbed.weights()
    manifest = (runs / "mine/manifest.json").read_json()
    reason = "the digit is 11, not one of 0..9; correct it or drop the row"
    assert re.search(rf"rejected: 50 rows: (0.parquet: row \d+,? ?){{5}}: {reason} ", said[0])
    assert manifest["data"]["bad_rows"]["reasons"] == {reason: 50}
    assert [done.line["data"][f"{split}_rows"] for split in SPLITS] == [605, 80, 65]
    assert manifest["status"] == "finished"


def test_a_training_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    four_nodes: Cluster, undisturbed: Result, rows: Path, tmp_path: Path
) -> None:
    """Ray Train would give it to new workers again and again; here rank 0 finds another one."""
    flags = [*FLAGS, "--max-failures", 1]
    job = Job(*training(rows, tmp_path, *flags), address=four_nodes.address)

    def is_in_the_list_of_ray() -> bool:
        lists = tmp_path.glob("mine/checkpoints/*/checkpoint_manager_snapshot.json")
        return any("epoch_00002" in file.read_text() for file in lists)

    job.wait_until(is_in_the_list_of_ray)
    (newest,) = tmp_path.glob("mine/checkpoints/*/epoch_00002/trainer.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1])
    kill(job, TRAIN)
    done = job.wait()
    assert f"checkpoint {newest.parent} cannot be used: {newest.name} is incomplete or" in done.err
    assert done.err.count("resuming after epoch") == done.err.count("resuming after epoch 1, ") == 1
    assert Result(done.line, done.err).weights() == undisturbed.weights()
    assert [line["epoch"] for line in history_of(tmp_path / "mine")] == [1, 2, 3]


@pytest.mark.nightly
@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_training_that_loses_nodes_gives_the_model_of_an_undisturbed_one(
    cache: str, four_nodes: Cluster, undisturbed: Result, rows: Path, tmp_path: Path
) -> None:
    """Also where rows are read anew in each epoch, by tasks that are lost too."""
    runs = locate(str(tmp_path), "--storage-path")
    flags = [*FLAGS, "--max-failures", 1]  # that a node was drained is no failure
    flags += ["--cache", cache]
    job = Job(*training(rows, tmp_path, *flags), address=four_nodes.address)
    wait_for_checkpoint(job, runs, 1)
    lose_node(four_nodes, notice=True)
    wait_for_checkpoint(job, runs, 2)
    lose_node(four_nodes, notice=False)
    done = job.wait()
    assert Result(done.line, done.err).weights() == undisturbed.weights()


@pytest.mark.nightly
def test_a_training_that_fails_too_often_ends_and_is_resumed(
    four_nodes: Cluster, undisturbed: Result, rows: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--max-failures", 1]
    job = Job(*training(rows, tmp_path, *flags), address=four_nodes.address)
    for epoch in (1, 2):
        wait_for_checkpoint(job, locate(str(tmp_path), "--storage-path"), epoch)
        kill(job, TRAIN)
    done = job.wait()
    assert (done.code, done.out) == (1, "")
    assert "\nerror: workers have failed more often than --max-failures allows, see " in done.err
    resumed = train_here(storage_path=tmp_path, name="mine", resume=True)
    assert "resuming after epoch 2, on 3 workers" in resumed.said
    assert resumed.weights() == undisturbed.weights()


@pytest.mark.nightly  # test_train.py stops and resumes one at each landing
def test_a_training_of_which_all_processes_were_killed_is_resumed(
    four_nodes: Cluster, undisturbed: Result, rows: Path, tmp_path: Path
) -> None:
    """By the same command with `--resume auto`; its newest checkpoint, and Ray's list, are cut."""
    job = Job(*training(rows, tmp_path, *FLAGS), address=four_nodes.address)
    wait_for_checkpoint(job, locate(str(tmp_path), "--storage-path"), 2)
    job.kill()
    assert '"running"' in (tmp_path / "mine/manifest.json").read_text()
    for name in ("*/epoch_00002/trainer.safetensors", "*/*manager_snapshot*"):
        (whole,) = tmp_path.glob(f"mine/checkpoints/{name}")
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    finished = train_here(data=rows, storage_path=tmp_path, resume="auto", **SETTINGS)
    assert "cannot be used: trainer.safetensors is incomplete or damaged" in finished.said
    assert "resuming after epoch 1, on 3 workers" in finished.said
    assert finished.weights() == undisturbed.weights()


@pytest.mark.root
def test_a_training_whose_disk_is_full_ends_and_is_resumed_when_there_is_room(
    undisturbed: Result, rows: Path, tmp_path: Path
) -> None:
    """There is room for a checkpoint and a half."""
    of_run = locate(undisturbed.line["run"], "--name")
    sizes = [file.size for file in of_run.files() if "epoch_00003/" in file.path]
    options = f"size={sum(sizes) * 3 // 2}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=True)
    try:
        with pytest.raises(RunError, match="--resume"):
            train_here(data=rows, storage_path=tmp_path, max_failures=0, **SETTINGS)
        assert not (tmp_path / "mine/model/model.json").exists()
        subprocess.run(["mount", "-o", "remount,size=60m", tmp_path], check=True)
        finished = train_here(storage_path=tmp_path, name="mine", resume=True)
        assert "resuming after epoch 1, on 3 workers" in finished.said
        assert finished.weights() == undisturbed.weights()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.nightly
def test_an_elastic_run_shrinks_and_grows(four_nodes: Cluster, tmp_path: Path) -> None:
    """Ray waits for a node that was lost, and looks every 30 s for more workers."""
    flags = ["--epochs", 1000, "--num-workers", "1,3", "--threads", 2, "--wait-seconds", 240]
    job = Job(*training(Path("sample"), tmp_path, *flags), address=four_nodes.address)

    def wait_for_workers(count: int) -> int:
        """Wait until so many train; return the epochs that were done before.

        Where a job before it has just died, the run begins with fewer.
        """
        begins = rf"(?:beginning|resuming after epoch (\d+)), on {count} workers"
        while True:
            found = re.match(begins, job.wait_for_line(("beginning, on", "resuming after epoch ")))
            if found:
                return int(found[1] or 0)

    start = wait_for_workers(3)
    job.wait_for_line(f"epoch {start + 2}: loss ")
    four_nodes.remove_node(four_nodes.list_all_nodes()[-1], allow_graceful=False)
    shrunk = wait_for_workers(2)
    add_node(four_nodes)
    grown = wait_for_workers(3)
    job.wait_for_line(f"epoch {grown + 1}: loss ")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code == 128 + signal.SIGTERM
    workers = [line["workers"] for line in history_of(tmp_path / "mine")]
    expected = [*[3] * (shrunk - start), *[2] * (grown - shrunk), 3]
    assert workers[start : grown + 1] == expected


# Scoring.
ROWS = 14_400
"""Enough for the job to be running still when something dies."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "in"
    export_pairs(ExportPairsConfig(data="sample", output=str(folder), rows=ROWS, files=6), print)
    return folder


SCORING: list[Any] = ["--precision", "fp32", "--max-rows-per-file", 250, "--label-column", "digit"]


def score_pairs(model: Path, pairs: Path, output: Path) -> Result:
    """Score with the same flags in this process."""
    settings = {"max_rows_per_file": 250, "label_column": "digit", "num_workers": 3}
    scored = score_here(model, output, pairs, **settings)
    assert scored.line["scored_rows"] == ROWS
    return scored


@pytest.fixture(scope="module")
def predictions(four_nodes: Cluster, model: Path, pairs: Path) -> dict[str, pa.Table]:
    """Those of an undisturbed scoring."""
    output = pairs.parent / "out"
    score_pairs(model, pairs, output)
    return predictions_of(locate(str(output), "--output"))


def predictions_of(output: Location) -> dict[str, pa.Table]:
    """Predictions by file, without the footers, which name the run."""
    folder = output / "predictions"
    names = [file.name for file in folder.files() if not file.name.startswith(".")]
    return {name: pq.read_table(pa.BufferReader((folder / name).read_bytes())) for name in names}


def test_a_scoring_gives_the_files_of_an_undisturbed_one(
    four_nodes: Cluster,
    s3_server: S3Server,
    predictions: dict[str, pa.Table],
    model: Path,
    pairs: Path,
) -> None:
    """A worker dies, the store answers 503 for ten seconds, and a node is lost.

    Input and model are in the store, too.
    """
    bucket = locate("s3://bucket", "--output")
    for file in [*pairs.iterdir(), *model.iterdir()]:
        (bucket / file.parent.name / file.name).write(file.read_bytes())
    output, refused = bucket / "out", s3_server.refused
    uris = ("s3://bucket/model", "s3://bucket/in", output.display)
    job = Job(*scoring(*uris, *SCORING), address=four_nodes.address)
    wait_for_files(job, output, 1)
    kill(job, SCORE)
    wait_for_files(job, output, 1)
    s3_server.overload(10)
    wait_for_files(job, output, 2)
    lose_node(four_nodes, notice=False)
    done = job.wait()
    assert (done.line["scored_rows"], done.line["resumed_rows"]) == (ROWS, 0)
    assert s3_server.refused > refused
    assert predictions_of(output) == predictions


def test_a_driver_that_is_killed_or_stopped_loses_nothing(
    four_nodes: Cluster, predictions: dict[str, pa.Table], pairs: Path, model: Path, tmp_path: Path
) -> None:
    command = scoring(model, pairs, tmp_path, *SCORING)
    job = Job(*command, address=four_nodes.address)
    wait_for_files(job, tmp_path, 1)
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait()

    job = Job(*command)  # on a cluster of its own
    wait_for_files(job, tmp_path, 1)
    children = psutil.Process(job.process.pid).children(recursive=True)
    job.process.send_signal(signal.SIGTERM)
    stopped = job.wait()
    wait_until(lambda: not any(map(is_alive, children)), 10)
    assert (stopped.code, stopped.out) == (128 + signal.SIGTERM, "")
    # Ray may say more after it.
    kept = "stopped by SIGTERM; what is scored is kept, and the same command continues\n"
    assert kept in stopped.err
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "manifest.json").exists()

    assert score_pairs(model, pairs, tmp_path).line["resumed_rows"] > 0
    assert predictions_of(locate(str(tmp_path), "--output")) == predictions


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


@pytest.mark.nightly
def test_a_file_that_kills_its_workers_ends_the_run(
    four_nodes: Cluster, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """A minute of workers that start."""
    deadly = tmp_path / "deadly.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(pairs / "part-00000.parquet")] * 5), deadly)
    flags = ["--num-workers", 1, "--max-rows-per-file", 100_000]
    job = Job(*scoring(model, deadly, tmp_path / "out", *flags), address=four_nodes.address)
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
def test_a_head_that_is_killed_ends_a_training(data: Path, tmp_path: Path) -> None:
    with nodes(1) as killed:
        job = Job(*training(data, tmp_path, "--epochs", 50), address=killed.address)
        job.wait_for_line("epoch 2: loss ")
        killed.remove_node(killed.head_node, allow_graceful=False)
        done = job.wait()
    assert done.code == os.EX_TEMPFAIL, done.err
    assert "\nerror: the head of the Ray cluster does not answer; " in done.err
    assert "--name mine --resume" in done.err


@pytest.mark.nightly
def test_a_head_that_is_killed_ends_a_scoring(
    model: Path,
    pairs: Path,
    predictions: dict[str, pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Ray's core, after 60 s by default."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    with nodes(1) as killed:
        job = Job(*scoring(model, pairs, tmp_path, *SCORING), address=killed.address)
        wait_for_files(job, tmp_path, 1)
        killed.remove_node(killed.head_node, allow_graceful=False)
        done = job.wait()
    assert (done.code, done.out) == (1, ""), done.err
    assert "Failed to connect to GCS within 15 seconds" in done.err
    assert score_pairs(model, pairs, tmp_path).line["resumed_rows"] > 0
    assert predictions_of(locate(str(tmp_path), "--output")) == predictions
