"""What training workers are fed on a real cluster, from memory and streamed: the same batches for any number of workers."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from torchvision.io import encode_png

from mnistsum_ray.cluster.tasks import map_files
from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.images import Pixels, pixels_view
from mnistsum_ray.data.order import RowIds, Shuffle, random_numbers
from mnistsum_ray.data.sources import Digits, ParquetFiles, Source, open_source
from mnistsum_ray.errors import RequestError, RunError, StorageError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training import rows as rows_module
from mnistsum_ray.training.fetch import LoadedRows, load_rows
from mnistsum_ray.training.rows import Batch, EvaluationSet, TrainingRows

SHUFFLE_ROWS = 400
BATCH = 48
SEED = 3
CPU = torch.device("cpu")

Rows = tuple[Source, LoadedRows, Shuffle]
Description = list[list[tuple[Any, ...]]]

pytestmark = pytest.mark.usefixtures("cluster")


def write_files(folder: Path, rows: pa.Table, group_rows: tuple[int, ...] = (30, 200, 700)) -> Path:
    """Write rows as one file per size of row groups, of which the last one holds the rest."""
    folder.mkdir()
    start = 0
    for index, size in enumerate(group_rows):
        end = rows.num_rows if index == len(group_rows) - 1 else start + rows.num_rows // len(group_rows)
        pq.write_table(rows.slice(start, end - start), folder / f"{index}.parquet", row_group_size=size)
        start = end
    return folder


def in_memory(folder: Path, batch_size: int = BATCH) -> Rows:
    source = open_source(str(folder))
    return source, load_rows(source, streamed=False), Shuffle(source.train, None, batch_size, SHUFFLE_ROWS, SEED)


def streamed(folder: Path, batch_size: int = BATCH) -> Rows:
    source = open_source(str(folder))
    assert source.files is not None
    shuffle = Shuffle(source.train, source.files.group_bounds, batch_size, SHUFFLE_ROWS, SEED)
    return source, load_rows(source, streamed=True), shuffle


WAYS: dict[str, Callable[..., Rows]] = {"in memory": in_memory, "streamed": streamed}


@pytest.fixture(scope="module")
def mixed(sample: pa.Table) -> pa.Table:
    """2,000 rows of the sample, all digits mixed."""
    return sample.take(pa.array(np.random.default_rng(0).permutation(5000)[:2000]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mixed: pa.Table) -> Path:
    """Every second image is a PNG."""
    images = mixed["image"].to_pylist()
    for row, pixels in enumerate(pixels_view(mixed["image"].combine_chunks())[::2]):
        images[2 * row] = encode_png(torch.tensor(pixels)[None]).numpy().tobytes()
    pictures = mixed.set_column(0, "image", pa.array(images, pa.binary()))
    return write_files(tmp_path_factory.mktemp("data") / "files", pictures)


def feed(rows: Rows, rank: int = 0, world_size: int = 1, **changed: Any) -> list[Batch]:
    """The batches of one worker over two epochs."""
    values = {"distortion": 1.0, "epochs": 2, "readers": 2} | changed
    return list(TrainingRows(rows[1].data, rows[2], rank=rank, world_size=world_size, device=CPU, **values).batches())


def described(batches: list[Batch]) -> Description:
    """Of each step row id, number and distortion of all rows."""
    columns = [[batch["row_id"].tolist(), batch["number"].tolist(), *batch["affine"].T.tolist()] for batch in batches]
    return [list(zip(*values, strict=True)) for values in columns]


def together(rows: Rows, world_size: int, **changed: Any) -> Description:
    """The global batches of several workers."""
    shares = [described(feed(rows, rank, world_size, **changed)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "every rank takes the same number of steps"
    return [[row for share in step for row in share] for step in zip(*shares, strict=True)]


@pytest.fixture(scope="module", params=WAYS)
def rows(request: pytest.FixtureRequest, cluster: str, folder: Path) -> Rows:
    return WAYS[request.param](folder)


@pytest.fixture(scope="module")
def alone(rows: Rows) -> list[Batch]:
    return feed(rows)


def test_every_row_once_an_epoch_with_its_own_image_number_and_distortion(
    alone: list[Batch], rows: Rows, mixed: pa.Table
) -> None:
    train = rows[0].train
    steps = -(-len(train) // BATCH)
    assert [len(batch["row_id"]) for batch in alone] == 2 * [*[BATCH] * (steps - 1), len(train) % BATCH]
    pixels, digits = pixels_view(mixed["image"].combine_chunks()), mixed["digit"].to_numpy()
    for index, batch in enumerate(alone):
        ids = batch["row_id"].numpy()
        assert np.array_equal(batch["image"].numpy(), pixels[ids])
        assert np.array_equal(batch["digit"].numpy(), digits[ids])
        assert np.array_equal(batch["number"].numpy(), random_numbers(SEED, index // steps, ids))
        assert np.array_equal(batch["affine"].numpy(), distortions(SEED, index // steps, ids, 1.0))
    orders = [np.concatenate([batch["row_id"] for batch in alone[first : first + steps]]) for first in (0, steps)]
    assert all(np.array_equal(np.sort(order), train.ids()) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    first = alone[0]["row_id"].numpy()
    assert len(set(first // 200)) >= 5, "batches are mixed from all files"
    assert "affine" not in feed(rows, distortion=0.0, epochs=1)[0]


def test_any_number_of_workers_sees_the_same_batches(alone: list[Batch], rows: Rows) -> None:
    assert together(rows, 2, epochs=1) == described(alone)[: len(alone) // 2]


def test_going_on_within_an_epoch_feeds_what_the_whole_run_would(alone: list[Batch], rows: Rows) -> None:
    assert together(rows, 2, first_epoch=1, first_step=17) == described(alone)[len(alone) // 2 + 17 :]


def test_tasks_of_any_size_are_one_stream(alone: list[Batch], rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_TASK_ROWS", 100)
    assert described(feed(rows, epochs=1)) == described(alone)[: len(alone) // 2]


def test_an_empty_share_is_an_empty_batch(folder: Path) -> None:
    """More workers than rows in the last batch: Ray Data drops blocks without rows, the steps must not shift for that."""
    source, loaded, shuffle = streamed(folder, batch_size=533)
    assert len(shuffle.rows) % 533 == 1
    batches = together((source, loaded, shuffle), 2, epochs=1)
    assert [len(batch) for batch in batches] == [533, 533, 533, 1]
    assert sorted(row[0] for batch in batches for row in batch) == source.train.ids().tolist()


def test_the_checksums_are_of_the_rows_and_not_of_the_files(tmp_path: Path, sample: pa.Table) -> None:
    prints = []
    for name, size, rows in (("a", 500, sample[::10]), ("b", 70, sample[::10]), ("c", 500, sample[::10][::-1])):
        source, counts = open_source(str(write_files(tmp_path / name, rows, (size,)))), list[int]()
        checksums = load_rows(source, streamed=False, on_progress=counts.append).checksums
        assert sum(counts) == 500
        assert checksums is not None
        prints.append(source.content_sha256(checksums))
    assert prints[0] == prints[1] != prints[2]


def test_a_bad_row_is_named(tmp_path: Path, mixed: pa.Table) -> None:
    values = mixed["image"].to_pylist()
    row = int(open_source(str(write_files(tmp_path / "good", mixed))).train.ids()[-1])
    values[row] = b"\x89PNG"
    files = write_files(tmp_path / "files", mixed.set_column(0, "image", pa.array(values, pa.binary())))
    said = rf"2\.parquet: row {row - 1332}: 4 bytes are neither 784 pixels nor a readable PNG"
    with pytest.raises(RequestError, match=said):
        in_memory(files)
    with pytest.raises(RunError, match=said):
        feed(streamed(files))
    source = open_source(str(files))
    (files / "2.parquet").unlink()
    with pytest.raises(RunError, match=r"--data .*2\.parquet: "):
        load_rows(source, streamed=False)


def test_bad_rows_are_counted_and_left_out_of_their_splits_from_memory_and_streamed(tmp_path: Path, mixed: pa.Table) -> None:
    """Among them are a whole row group, and the first and the last row."""
    bad, values = [0, *range(666, 866), 1999], mixed["image"].to_pylist()
    good = open_source(str(write_files(tmp_path / "good", mixed)))
    for row in bad:
        values[row] = None
    folder = write_files(tmp_path / "bad", mixed.set_column(0, "image", pa.array(values, pa.binary())))
    null = "the image is null; fill it in or drop the row"
    said = (
        rf"^--data {folder}: 202 of 2,000 rows .* 0\.parquet: row 0: {null} \| .* \| …; most often: 202 x {null}; "
        "a new run with --skip-bad"
    )
    with pytest.raises(RequestError, match=said):
        in_memory(folder)
    loaded = [load_rows(open_source(str(folder)), streamed=streamed, skip_bad_rows=True) for streamed in (False, True)]
    assert loaded[0].checksums is not None
    assert loaded[0].checksums.tolist() == loaded[1].checksums.tolist()  # type: ignore[union-attr]
    for rows in loaded:
        assert [split.ids().tolist() for split in rows.source.splits] == [
            np.setdiff1d(split.ids(), bad).tolist() for split in good.splits
        ]
        assert rows.source.bad.reasons == {null: 202}
    assert loaded[1].source.files is not None
    shuffle = Shuffle(loaded[1].source.train, loaded[1].source.files.group_bounds, BATCH, SHUFFLE_ROWS, SEED)
    batches = together((loaded[1].source, loaded[1], shuffle), 2, epochs=1)
    assert sorted(row[0] for batch in batches for row in batch) == loaded[1].source.train.ids().tolist()


@dataclass(frozen=True)
class DeadlyFiles(ParquetFiles):
    """The process that reads rows of the last file is killed, as the kernel does when memory is short."""

    def fetch(self, ids: RowIds) -> tuple[Pixels, Digits]:
        if (ids >= self.end_ids[-2]).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(ids)


def test_files_whose_process_always_dies_are_named_and_an_error_of_the_storage_is_raised(tmp_path: Path) -> None:
    files, place = pa.table({"name": [f"{number}.parquet" for number in range(1200)]}), locate(str(tmp_path), "--input")

    def read(folder: Location, files: pa.Table) -> pa.Table:
        if (tmp_path / files["name"][0].as_py()).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (tmp_path / "gone").exists():
            raise StorageError("is gone")
        return files

    counted = list[int]()
    assert map_files(read, place, files, counted.append) == files
    assert sorted(counted) == [200, 500, 500]
    (tmp_path / "500.parquet").touch()
    said = r"500\.parquet to .*/999\.parquet: the process that reads them died 3 times \(out of memory\?"
    with pytest.raises(RunError, match=said):
        map_files(read, place, files)
    (tmp_path / "500.parquet").rename(tmp_path / "gone")
    with pytest.raises(StorageError, match="is gone"):
        map_files(read, place, files)


@pytest.mark.slow
def test_a_file_whose_reader_always_dies_ends_the_run_and_is_named(folder: Path) -> None:
    source, _, shuffle = streamed(folder)
    assert source.files is not None
    files = DeadlyFiles(source.files.root, source.files.table)
    said = r"2\.parquet: the process that reads there died 3 times \(out of memory\? Ray's logs may tell\)"
    deadly = replace(source, data=files)
    with pytest.raises(RunError, match=said):
        feed((source, load_rows(deadly, streamed=True), shuffle), epochs=1)


def test_held_out_rows_are_shared_out_whole(rows: Rows) -> None:
    data, held_out = ray.get(rows[1].data), rows[0].train
    sets = [EvaluationSet(data, held_out, rank, 3, CPU, lambda images: images) for rank in range(3)]
    shares = [[batch["row_id"] for batch, _ in held_out.with_digit_scores()] for held_out in sets]
    assert [sum(map(len, share)) for share in shares] == [533, 533, 534]
    assert np.array_equal(np.sort(np.concatenate([ids for share in shares for ids in share])), held_out.ids())
