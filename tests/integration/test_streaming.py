"""Streamed training rows, on a real cluster: the same global batches for any number of workers, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.cluster_utils import Cluster

from mnistsum_ray.benchmark.feed import png_file
from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.pixels import Pixels, pixels_view
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import random_numbers
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RunError
from mnistsum_ray.training import streaming
from mnistsum_ray.training.pipeline import Batch, EvaluationSet, load_rows
from mnistsum_ray.training.streaming import StreamedRows
from tests.integration.conftest import Job, kill_everything, kill_worker, run_job
from tests.integration.test_kills import left
from tests.integration.test_pipeline import CPU, feed

SHUFFLE_ROWS = 400
BATCH = 48


def write_files(folder: Path, rows: pa.Table, group_rows: tuple[int, ...] = (30, 200, 700)) -> Path:
    """Write rows as one file per size of row groups, of which the last one holds the rest."""
    folder.mkdir()
    start = 0
    for index, size in enumerate(group_rows):
        end = rows.num_rows if index == len(group_rows) - 1 else start + rows.num_rows // len(group_rows)
        pq.write_table(rows.slice(start, end - start), folder / f"{index}.parquet", row_group_size=size)
        start = end
    return folder


@pytest.fixture(scope="module")
def mixed(sample: pa.Table) -> pa.Table:
    """2,000 rows of the sample, all digits mixed."""
    return sample.take(pa.array(np.random.default_rng(0).permutation(5000)[:2000]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mixed: pa.Table) -> Path:
    return write_files(tmp_path_factory.mktemp("data") / "files", mixed)


def streamed(source: Source) -> StreamedRows:
    assert source.files is not None
    return StreamedRows(source.files, SHUFFLE_ROWS, readers=2)


def pixels_of(table: pa.Table) -> Pixels:
    return pixels_view(table["image"].combine_chunks())


def global_batches(source: Source, world_size: int, **changed: int) -> list[list[tuple[int, ...]]]:
    """Of each step, row id, number and distortion of all rows of all workers, in ascending order."""
    shares = [feed(streamed(source), source.train, rank, world_size, distortion=1.0, **changed) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "every rank takes the same number of steps"
    return [sorted(row for batch in step for row in described(batch)) for step in zip(*shares, strict=True)]


def described(batch: Batch) -> list[tuple[int, ...]]:
    columns = [batch["row_id"].tolist(), batch["number"].tolist(), *batch["affine"].T.tolist()]
    return list(zip(*columns, strict=True))


@pytest.fixture(scope="module")
def alone(cluster: str, folder: Path) -> list[list[tuple[int, ...]]]:
    return global_batches(open_source(str(folder)), 1)


def test_every_row_once_an_epoch_with_its_own_image(cluster: str, folder: Path, mixed: pa.Table) -> None:
    source = open_source(str(folder))
    batches = feed(streamed(source), source.train, 0, 1, distortion=1.0)
    steps = -(-len(source.train) // BATCH)
    assert [len(batch["row_id"]) for batch in batches] == 2 * [*[BATCH] * (steps - 1), len(source.train) % BATCH]
    pixels, digits = pixels_of(mixed), mixed["digit"].to_numpy()
    orders = []
    for epoch in range(2):
        ids = torch.cat([batch["row_id"] for batch in batches[epoch * steps : (epoch + 1) * steps]]).numpy()
        assert np.array_equal(np.sort(ids), source.train.ids())
        orders.append(ids)
    assert not np.array_equal(orders[0], orders[1])
    for index, batch in enumerate(batches):
        ids = batch["row_id"].numpy()
        assert np.array_equal(batch["image"].numpy(), pixels[ids])
        assert np.array_equal(batch["digit"].numpy(), digits[ids])
        assert np.array_equal(batch["number"].numpy(), random_numbers(3, index // steps, ids))
        assert np.array_equal(batch["affine"].numpy(), distortions(3, index // steps, ids, 1.0))


def test_batches_are_mixed_from_all_files(alone: list[list[tuple[int, ...]]]) -> None:
    first = [row[0] for row in alone[0]]
    assert len({row // 200 for row in first}) >= 5
    neighbours = np.diff(first)
    assert np.median(neighbours) > 3


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.sweep])])
def test_any_number_of_workers_sees_the_same_batches(alone: list[list[tuple[int, ...]]], folder: Path, world_size: int) -> None:
    """Ten workers are more than the eight lanes."""
    assert global_batches(open_source(str(folder)), world_size) == alone


def test_going_on_within_an_epoch_feeds_what_the_whole_run_would(alone: list[list[tuple[int, ...]]], folder: Path) -> None:
    steps = len(alone) // 2
    rest = global_batches(open_source(str(folder)), 2, first_epoch=1, first_step=17)
    assert rest == alone[steps + 17 :]


def test_several_executions_are_one_stream(
    alone: list[list[tuple[int, ...]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_TASKS_PER_EXECUTION", 30)
    monkeypatch.setattr(streaming, "_EARLY_TASKS", 3)
    assert global_batches(open_source(str(folder)), 1, epochs=1) == alone[: len(alone) // 2]


def test_pictures_are_streamed_as_raw_bytes_are(
    cluster: str, folder: Path, mixed: pa.Table, tmp_path: Path, alone: list[list[tuple[int, ...]]]
) -> None:
    pictures = pa.array([png_file(image) for image in pixels_of(mixed)], pa.binary())
    source = open_source(str(write_files(tmp_path / "png", mixed.set_column(0, "image", pictures))))
    batches = feed(streamed(source), source.train, 0, 1, distortion=1.0)
    assert [sorted(described(batch)) for batch in batches] == alone
    assert np.array_equal(batches[5]["image"].numpy(), pixels_of(mixed)[batches[5]["row_id"].numpy()])


def test_held_out_rows_are_shared_out_whole_and_a_few_rows_come_in_any_order(cluster: str, folder: Path, mixed: pa.Table) -> None:
    source = open_source(str(folder))
    shares = [
        torch.cat([batch["row_id"] for batch in EvaluationSet(streamed(source), source.train, rank, 3, CPU).batches])
        for rank in range(3)
    ]
    assert all(400 < len(share) < 670 for share in shares)
    ids = torch.cat(shares).numpy()
    assert np.array_equal(np.sort(ids), source.train.ids())
    some = np.array([1999, 3, 777, 778, 20])
    loaded = load_rows(streamed(source), some)
    assert np.array_equal(loaded["row_id"], some)
    assert np.array_equal(loaded["image"], pixels_of(mixed)[some])
    assert not len(load_rows(streamed(source), np.empty(0, np.int64))["image"])


def test_a_sample_is_spread_over_the_files(folder: Path) -> None:
    source = open_source(str(folder))
    rows = streamed(source).sample(source.train, 100)
    assert len(rows) == 100
    assert np.isin(rows.ids(), source.train.ids()).all()
    assert len(np.unique(rows.ids() // 200)) >= 8
    assert len(streamed(source).sample(RowRanges.from_ids(np.arange(50)), 100)) == 50


def test_a_file_that_changes_or_goes_is_named(cluster: str, mixed: pa.Table, tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path / "files", mixed)))
    file = tmp_path / "files" / "1.parquet"
    os.utime(file, (0, 0))
    with pytest.raises(RunError, match=rf"{file}: has changed since the run began"):
        feed(streamed(source), source.train, 0, 1)
    file.unlink()
    with pytest.raises(RunError, match=rf"{file}: is not there any more"):
        feed(streamed(source), source.train, 0, 1)


def test_a_bad_row_is_named(cluster: str, mixed: pa.Table, tmp_path: Path) -> None:
    row = int(open_source(str(write_files(tmp_path / "good", mixed))).train.within(1500, 2000).ids()[0])
    values = mixed["image"].to_pylist()
    values[row] = b"\x89PNG"
    source = open_source(str(write_files(tmp_path / "files", mixed.set_column(0, "image", pa.array(values, pa.binary())))))
    with pytest.raises(RunError, match=rf"2\.parquet: row {row - 1332}: 4 bytes are neither 784 pixels nor a readable PNG"):
        feed(streamed(source), source.train, 0, 1)


TRAINING = ["--epochs", 3, "--shuffle-rows", SHUFFLE_ROWS, "--sum-head-steps", 50]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[bytes, list[float]]:
    runs = tmp_path_factory.mktemp("runs")
    done = run_job("train", "--data", folder, *TRAINING, "--storage-path", runs, "--name", "undisturbed")
    assert "streaming 1,600 training rows, shuffled in windows of 400 in 8 lanes; holds at most 1 MiB" in done.err
    assert "are read" in done.err, "the row groups of 700 rows are larger than a window"
    manifest = json.loads((runs / "undisturbed" / "manifest.json").read_text())
    assert manifest["config"]["shuffle_rows"] == SHUFFLE_ROWS
    assert done.line["data"] == {"source": "parquet", "train_rows": 1600, "validation_rows": 200, "test_rows": 200}
    assert pq.read_table(runs / "undisturbed" / "data_files.parquet")["rows"].to_pylist() == [666, 666, 668]
    return left(done)


@pytest.mark.slow
@pytest.mark.sweep
def test_a_killed_worker_changes_nothing(tmp_path: Path, folder: Path, undisturbed: tuple[bytes, list[float]]) -> None:
    job = Job("train", "--data", folder, *TRAINING, "--storage-path", tmp_path, "--name", "worker")
    job.wait_for_line("epoch 2: train loss")  # the checkpoint of the first epoch has been saved
    kill_worker(job.process.pid, "RayTrainWorker")
    job.wait_for_line("going on after epoch")
    assert left(job.wait()) == undisturbed


@pytest.mark.slow
@pytest.mark.sweep
def test_everything_killed_and_resumed_changes_nothing(
    tmp_path: Path, folder: Path, undisturbed: tuple[bytes, list[float]]
) -> None:
    job = Job("train", "--data", folder, *TRAINING, "--storage-path", tmp_path, "--name", "all")
    job.wait_for_line("epoch 2: train loss")
    kill_everything(job.process.pid)
    job.wait()
    done = run_job("train", "--storage-path", tmp_path, "--name", "all", "--resume")
    assert "going on after epoch" in done.err
    assert left(done) == undisturbed


@pytest.mark.sweep
@pytest.mark.slow
def test_a_file_that_changed_is_refused_by_name_when_the_run_is_resumed(tmp_path: Path, mixed: pa.Table) -> None:
    files = write_files(tmp_path / "files", mixed)
    flags = ["--data", files, *TRAINING, "--storage-path", tmp_path, "--name", "mine"]
    job = Job("train", *flags)
    job.wait_for_line("epoch 1: train loss")
    kill_everything(job.process.pid)
    job.wait()
    os.utime(files / "1.parquet", (0, 0))
    refused = run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume")
    assert refused.code == 2
    assert (
        f"error: --resume: {files}/1.parquet: has changed since the run began; put it back as it was, with its time"
        in refused.err
    )
    other = run_job("train", "--storage-path", tmp_path, "--name", "mine", "--resume", "--shuffle-rows", 500)
    assert other.code == 2
    assert "--shuffle-rows 500: the run mine has 400" in other.err


@pytest.mark.slow
@pytest.mark.sweep
def test_a_file_that_changes_while_the_run_trains_ends_it_at_once(tmp_path: Path, mixed: pa.Table) -> None:
    files = write_files(tmp_path / "files", mixed)
    job = Job("train", "--data", files, *TRAINING, "--epochs", 40, "--storage-path", tmp_path, "--name", "mine")
    job.wait_for_line("epoch 1: train loss")
    os.utime(files / "1.parquet", (0, 0))
    done = job.wait()
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"error: {files}/1.parquet: has changed since the run began; start another run")
    assert done.err.count("worker 0 failed") <= 1, "another attempt would fail in the same way"
    assert json.loads((tmp_path / "mine" / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.sweep
def test_many_held_out_rows_are_streamed_beside_training_rows_in_memory(tmp_path: Path, mixed: pa.Table) -> None:
    (tmp_path / "data").mkdir()
    write_files(tmp_path / "data" / "train", mixed.slice(0, 300))
    write_files(tmp_path / "data" / "test", mixed.slice(300))
    flags = ["--data", tmp_path / "data", *TRAINING, "--storage-path", tmp_path]
    done = run_job("train", *flags, "--name", "many")
    assert "in the object store of each node; the 1,730 held-out rows are streamed for each evaluation" in done.err
    assert (done.line["data"]["train_rows"], done.line["test"]["rows"]) == (270, 1700)
    all_in_memory = run_job("train", *flags, "--name", "memory", "--shuffle-rows", 2000)
    assert left(done) == left(all_in_memory), "the training rows are in memory in both"
    assert done.line["test"]["digit_accuracy"] == all_in_memory.line["test"]["digit_accuracy"]


def test_what_does_not_fit_is_refused_before_it_starts(tmp_path: Path, folder: Path) -> None:
    """166,500 rows of 0.8 KB do not fit into an object store of 80 MiB."""
    big = tmp_path / "big"
    big.mkdir()
    rows = pq.read_table(folder / "0.parquet")
    pq.write_table(pa.concat_tables([rows] * 250), big / "rows.parquet")
    small = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    )
    try:
        refused = run_job("train", "--data", big, "--storage-path", tmp_path, "--name", "mine", address=small.address)
    finally:
        small.shutdown()
    assert refused.code == 2
    assert "--shuffle-rows 1000000: the run would hold" in refused.err.splitlines()[-1]
    assert "of rows in the object store of a node, which has 80 MiB; give --shuffle-rows" in refused.err.splitlines()[-1]
