"""The Ray Data side, on a real cluster: what is read, and what each worker is fed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.pixels import pixels_view
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import random_numbers, steps_per_epoch
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.in_memory import InMemoryRows, MaterializedSource, materialize_source
from mnistsum_ray.training.pipeline import Batch, EvaluationSet, Rows
from mnistsum_ray.training.schedule import Schedule

WriteRows = Callable[[int], Path]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("cluster")


def rows_of(loaded: MaterializedSource) -> InMemoryRows:
    return InMemoryRows(loaded.images, loaded.first_ids)


def feed(access: Rows, rows: RowRanges, rank: int, world_size: int, **changed: Any) -> list[Batch]:
    values = {"batch_size": 48, "seed": 3, "distortion": 0.0, "epochs": 2} | changed
    schedule = Schedule(rows=rows, lanes=access.lanes(rows, values["batch_size"]), rank=rank, world_size=world_size, **values)
    return list(access.training_batches(schedule, CPU))


def test_the_blocks_hold_every_row_in_order(write_rows: WriteRows) -> None:
    path = write_rows(1000)  # five row groups, and more than one part after reading
    loaded = materialize_source(open_source(str(path)))
    assert loaded.images.count() == 1000
    assert [row["image"] for row in loaded.images.take_all()] == pq.read_table(path)["image"].to_pylist()
    assert materialize_source(open_source(str(path))).fingerprint == loaded.fingerprint


def test_the_fingerprint_is_of_the_rows_and_not_of_the_files(tmp_path: Path, sample: pa.Table) -> None:
    rows = sample[::10]
    for name, size in (("a", 500), ("b", 70)):
        (tmp_path / name).mkdir()
        pq.write_table(rows, tmp_path / name / "rows.parquet", row_group_size=size)
    (tmp_path / "c").mkdir()
    pq.write_table(rows[::-1], tmp_path / "c" / "rows.parquet")
    prints = [materialize_source(open_source(str(tmp_path / name))).fingerprint for name in ("a", "b", "c")]
    assert prints[0] == prints[1] != prints[2]


def test_a_bad_row_found_on_the_cluster_is_a_refusal_that_names_it(tmp_path: Path, sample: pa.Table) -> None:
    rows = sample[::10].to_pylist()
    rows[321]["image"] = b"\x89PNG"
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"image": pa.binary(), "digit": pa.int8()})), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"a\.parquet: row 321: 4 bytes are neither 784 pixels nor a readable PNG"):
        materialize_source(open_source(str(tmp_path)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_an_epoch_with_its_own_number(write_rows: WriteRows, world_size: int) -> None:
    path = write_rows(500)
    source = open_source(str(path))
    images = rows_of(materialize_source(source))
    table = pq.read_table(path)
    pixels, digits = pixels_view(table["image"].combine_chunks()), table["digit"].to_numpy()
    shares = [feed(images, source.train, rank, world_size) for rank in range(world_size)]
    steps = -(-len(source.train) // 48)
    assert {len(share) for share in shares} == {2 * steps}, "every rank takes the same number of steps"
    for epoch in range(2):
        batches = [batch for share in shares for batch in share[epoch * steps : (epoch + 1) * steps]]
        ids = torch.cat([batch["row_id"] for batch in batches]).numpy()
        assert np.array_equal(np.sort(ids), source.train.ids())
        numbers = torch.cat([batch["number"] for batch in batches]).numpy()
        assert np.array_equal(numbers, random_numbers(3, epoch, ids))
        images_fed = torch.cat([batch["image"] for batch in batches])
        assert images_fed.dtype == torch.uint8
        assert np.array_equal(images_fed.numpy(), pixels[ids])
        assert np.array_equal(torch.cat([batch["digit"] for batch in batches]).numpy(), digits[ids])


def test_the_block_layout_changes_nothing(tmp_path: Path, sample: pa.Table) -> None:
    fed = []
    for size in (1000, 64):
        path = tmp_path / f"{size}.parquet"
        pq.write_table(sample[::5], path, row_group_size=size)
        source = open_source(str(path))
        images = materialize_source(source).images.repartition(1000 // size).materialize()
        counts = [ray.get(block).num_rows for block in images.to_arrow_refs()]
        fed.append(feed(InMemoryRows(images, np.cumsum(counts) - counts), source.train, 0, 1, distortion=1.0))
    for one, other in zip(*fed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 1), (3, 2)])
def test_an_empty_share_is_an_empty_batch(write_rows: WriteRows, world_size: int, batch_size: int) -> None:
    """More workers than rows in a batch: Ray Data drops blocks without rows, the steps must not shift for that."""
    source = open_source(str(write_rows(100)))
    images = rows_of(materialize_source(source))
    first = RowRanges.from_ids(source.train.ids()[:21])
    shares = [feed(images, first, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {2 * -(-21 // batch_size)}
    for steps in zip(*shares, strict=True):
        assert sum(len(batch["row_id"]) for batch in steps) in (batch_size, 21 % batch_size)
    seen = torch.cat([batch["row_id"] for share in shares for batch in share]).tolist()
    assert sorted(seen) == sorted(2 * first.ids().tolist())


def test_going_on_after_an_epoch_feeds_what_the_whole_run_would(write_rows: WriteRows) -> None:
    source = open_source(str(write_rows(500)))
    images = rows_of(materialize_source(source))
    whole = feed(images, source.train, 0, 1, distortion=1.0)
    rest = feed(images, source.train, 0, 1, distortion=1.0, first_epoch=1)
    for one, other in zip(whole[len(whole) // 2 :], rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_going_on_within_an_epoch_feeds_what_the_whole_run_would(write_rows: WriteRows) -> None:
    source = open_source(str(write_rows(500)))
    images = rows_of(materialize_source(source))
    whole = feed(images, source.train, 1, 2, distortion=1.0)
    rest = feed(images, source.train, 1, 2, distortion=1.0, first_epoch=1, first_step=3)
    for one, other in zip(whole[len(whole) // 2 + 3 :], rest, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_distortions_come_with_their_rows(write_rows: WriteRows) -> None:
    source = open_source(str(write_rows(500)))
    images = rows_of(materialize_source(source))
    for index, batch in enumerate(feed(images, source.train, 0, 1, distortion=1.0)):
        epoch = index // steps_per_epoch(len(source.train), 48)
        assert np.array_equal(batch["affine"].numpy(), distortions(3, epoch, batch["row_id"].numpy(), 1.0))
    assert "affine" not in feed(images, source.train, 0, 1)[0]


def test_held_out_rows_are_shared_out_whole(write_rows: WriteRows) -> None:
    source = open_source(str(write_rows(1000)))
    images = rows_of(materialize_source(source))
    shares = [EvaluationSet(images, source.train, rank, 3, CPU).batches for rank in range(3)]
    ids = torch.cat([batch["row_id"] for share in shares for batch in share]).numpy()
    assert np.array_equal(np.sort(ids), source.train.ids())
