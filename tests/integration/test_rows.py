"""What training workers are fed on a real cluster, from memory and streamed: the same batches for any number of workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.order import Shuffle, random_numbers
from mnistsum_ray.data.sources import Source, open_source
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.training.fetch import LoadedRows, load_rows
from mnistsum_ray.training.rows import Batch, EvaluationSet, TrainingRows

SHUFFLE_ROWS = 400
BATCH = 48
SEED = 3
CPU = torch.device("cpu")

Rows = tuple[Source, LoadedRows, Shuffle]
Description = list[list[tuple[Any, ...]]]

pytestmark = pytest.mark.usefixtures("cluster")


def write_files(folder: Path, rows: pa.Table) -> Path:
    """Write rows as three files, whose row groups differ in size."""
    folder.mkdir()
    third = rows.num_rows // 3
    for index, (count, group_rows) in enumerate(((third, 30), (third, 200), (rows.num_rows, 700))):
        pq.write_table(rows.slice(index * third, count), folder / f"{index}.parquet", row_group_size=group_rows)
    return folder


def opened(folder: Path, streamed: bool, batch_size: int = BATCH, skip_bad_rows: bool = False) -> Rows:
    loaded = load_rows(open_source(str(folder)), streamed=streamed, skip_bad_rows=skip_bad_rows)
    files = loaded.source.files
    assert files is not None
    bounds = files.group_bounds if streamed else None
    return loaded.source, loaded, Shuffle(loaded.source.train, bounds, batch_size, SHUFFLE_ROWS, SEED)


@pytest.fixture(scope="module")
def mixed(sample: pa.Table) -> pa.Table:
    """2,000 rows of the sample, all digits mixed."""
    return sample.take(pa.array(np.random.default_rng(0).permutation(5000)[:2000]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mixed: pa.Table) -> Path:
    return write_files(tmp_path_factory.mktemp("data") / "files", mixed)


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


@pytest.fixture(scope="module", params=[False, True], ids=["in memory", "streamed"])
def rows(request: pytest.FixtureRequest, cluster: str, folder: Path) -> Rows:
    return opened(folder, request.param)


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


def test_any_number_of_workers_sees_the_same_batches_and_may_go_on_after_an_epoch(alone: list[Batch], rows: Rows) -> None:
    whole = described(alone)
    assert together(rows, 3, epochs=1) == whole[: len(whole) // 2]
    assert together(rows, 2, first_epoch=1) == whole[len(whole) // 2 :]


def test_an_empty_share_is_an_empty_batch(folder: Path) -> None:
    """More workers than rows in the last batch: Ray Data drops blocks without rows, the steps must not shift for that."""
    rows = opened(folder, True, batch_size=533)
    batches = together(rows, 2, epochs=1)
    assert [len(batch) for batch in batches] == [533, 533, 533, 1]
    assert sorted(row[0] for batch in batches for row in batch) == rows[0].train.ids().tolist()


def with_images(folder: Path, rows: pa.Table, image: bytes | None, *places: int) -> Path:
    """Write the rows with this image at these places."""
    values = rows["image"].to_pylist()
    for place in places:
        values[place] = image
    return write_files(folder, rows.set_column(0, "image", pa.array(values, pa.binary())))


def test_a_bad_row_is_named(tmp_path: Path, folder: Path, mixed: pa.Table) -> None:
    row = int(open_source(str(folder)).train.ids()[-1])
    files = with_images(tmp_path / "files", mixed, b"\x89PNG", row)
    said = rf"2\.parquet: row {row - 1332}: 4 bytes are neither 784 pixels nor a readable PNG"
    with pytest.raises(RequestError, match=said):
        opened(files, False)
    with pytest.raises(RunError, match=said):
        feed(opened(files, True))
    source = open_source(str(files))
    (files / "2.parquet").unlink()
    with pytest.raises(RunError, match=r"--data .*2\.parquet: "):
        load_rows(source, streamed=False)


def test_bad_rows_are_counted_and_left_out_of_their_splits(tmp_path: Path, folder: Path, mixed: pa.Table) -> None:
    """Among them are a whole row group, and the first and the last row."""
    bad = [0, *range(666, 866), 1999]
    files = with_images(tmp_path / "bad", mixed, None, *bad)
    null = "the image is null; fill it in or drop the row"
    said = rf"^--data {files}: 202 of 2,000 rows .* 0\.parquet: row 0: {null} \| .* \| …; most often: 202 x {null}; "
    with pytest.raises(RequestError, match=said):
        opened(files, False)
    for streamed in (False, True):
        rows = opened(files, streamed, skip_bad_rows=True)
        for good, split in zip(open_source(str(folder)).splits, rows[0].splits, strict=True):
            assert split.ids().tolist() == np.setdiff1d(good.ids(), bad).tolist()
        assert rows[0].bad.reasons == {null: 202}
    batches = together(rows, 2, epochs=1)
    assert sorted(row[0] for batch in batches for row in batch) == rows[0].train.ids().tolist()


def test_held_out_rows_are_shared_out_whole(rows: Rows) -> None:
    data, held_out = ray.get(rows[1].data), rows[0].train
    sets = [EvaluationSet(data, held_out, rank, 3, CPU, lambda images: images) for rank in range(3)]
    shares = [[batch["row_id"] for batch, _ in held_out.with_digit_scores()] for held_out in sets]
    assert [sum(map(len, share)) for share in shares] == [533, 533, 534]
    assert np.array_equal(np.sort(np.concatenate([ids for share in shares for ids in share])), held_out.ids())
