"""What training workers get: each row once an epoch, for any number of them the same batches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mnistsum_ray.training.pipeline import StepsInOrder, start_name
from ray._private.internal_api import memory_summary

from mnistsum_ray.data.images import pixels_array, pixels_view
from mnistsum_ray.data.randomness import (
    TrainingOrder,
    distortions,
    positions_of_rank,
    random_numbers,
)
from mnistsum_ray.data.sources import Block, open_source
from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.training import driver, pipeline
from mnistsum_ray.training.rows import TrainingData, load_blocks
from mnistsum_ray.training.trainer import Batch, TrainingBatches
from tests.conftest import write_sample
from tests.integration.conftest import start_cluster, train_here

BATCH = 5_333
"""The last of four batches has one row, and so none for some workers."""
SEED = 3
EPOCHS = 2
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def mixed(sample: pa.Table) -> pa.Table:
    """20,000 rows of the sample, all digits mixed."""
    return sample.take(pa.array(np.random.default_rng(0).permutation(20_000) % 5_000))


def loaded(files: Path, skip_bad_rows: bool = False) -> TrainingData:
    """The rows in windows of two blocks."""
    source, blocks, _ = load_blocks(open_source(str(files)), skip_bad_rows=skip_bad_rows)
    order = TrainingOrder(source.train, blocks.bounds, BATCH, SEED, window_blocks=2)
    return TrainingData(blocks, order, source.validation, source.test)


@pytest.fixture(scope="module")
def training_data(
    cluster: str, mixed: pa.Table, tmp_path_factory: pytest.TempPathFactory
) -> TrainingData:
    """Of three files: the first two share a block, and the third has two."""
    folder = tmp_path_factory.mktemp("data")
    for first, end, group_rows in ((0, 5_000, 300), (5_000, 7_000, 2_000), (7_000, 20_000, 7_000)):
        path = folder / f"{first:05d}.parquet"
        pq.write_table(mixed.slice(first, end - first), path, row_group_size=group_rows)
    return loaded(folder)


def feed(data: TrainingData, ranks: int = 1, first: int = 0) -> list[list[Batch]]:
    """The batches of each rank from an epoch on."""
    steps = StepsInOrder(ray.put(data), EPOCHS, 1.0, readers=2)
    shards = steps.configure([start_name(first)], ranks)
    batches = []
    for rank, shard in enumerate(shards):
        positions = positions_of_rank(BATCH, rank, ranks)
        rows = TrainingBatches(shard[start_name(first)], CPU)
        taken = []
        for step in [*range(data.order.steps)] * (EPOCHS - first):
            end = min(positions.stop, data.order.batch_rows(step))
            taken.append(rows.take(max(0, end - positions.start)))
        assert not len(rows.take(1)["row_id"]), "nothing is left"
        batches.append(taken)
    return batches


def together(ranks: list[list[Batch]]) -> list[list[tuple[Any, ...]]]:
    """Row id, number and distortion of all rows of each global batch."""
    described = []
    for shares in zip(*ranks, strict=True):
        rows: list[tuple[Any, ...]] = []
        for share in shares:
            columns = [share["row_id"].tolist(), share["number"].tolist()]
            rows += zip(*columns, *share["affine"].T.tolist(), strict=True)
        described.append(rows)
    return described


def test_every_row_once_an_epoch_in_the_same_batches_for_any_number_of_workers(
    training_data: TrainingData, mixed: pa.Table
) -> None:
    """With its own image, number and distortion; also from a later epoch on."""
    order = training_data.order
    steps = order.steps
    pixels = pixels_view(mixed["image"].combine_chunks())
    digits = mixed["digit"].to_numpy()
    alone = feed(training_data)
    for index, batch in enumerate(alone[0]):
        epoch, ids = index // steps, batch["row_id"].numpy()
        assert np.array_equal(batch["image"].numpy(), pixels[ids])
        assert np.array_equal(batch["digit"].numpy(), digits[ids])
        assert np.array_equal(batch["number"].numpy(), random_numbers(SEED, epoch, ids))
        assert np.array_equal(batch["affine"].numpy(), distortions(SEED, epoch, ids, 1.0))
    whole = together(alone)
    assert [len(rows) for rows in whole] == EPOCHS * [BATCH, BATCH, BATCH, 1]
    for batches in (whole[:steps], whole[steps:]):
        assert sorted(row[0] for rows in batches for row in rows) == order.ids.tolist()
    assert whole[0] != whole[steps]
    assert together(feed(training_data, ranks=3)) == whole
    assert together(feed(training_data, ranks=2, first=1)) == whole[steps:]


def test_the_fingerprint_is_that_of_a_copy_and_not_of_other_pixels_digits_or_splits(
    write_rows: Callable[[int], Path], tmp_path: Path
) -> None:
    source = open_source(str(write_rows(500)))
    (block,) = source.groups[0].blocks()
    copy = tmp_path / "other name.parquet"
    pq.write_table(pq.read_table(source.location), copy, row_group_size=7)
    sources = [
        source,
        replace(source, groups=[Block(block.images ^ np.uint8(1), block.digits, {})]),
        replace(source, groups=[Block(block.images, (block.digits + 1) % 10, {})]),
        replace(source, validation=source.test, test=source.validation),
        replace(source, train=source.train[1:]),
        open_source(str(copy)),
    ]
    *different, last = [load_blocks(each, skip_bad_rows=False)[2] for each in sources]
    assert last == different[0]
    assert len(set(different)) == len(different)


@pytest.mark.slow
def test_a_pipeline_that_repeats_a_row_in_the_place_of_another_fails_the_run(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two workers gets a wrong row. Other wrong counts: tests/training."""

    class Reads(pipeline.ReadSteps):
        def __call__(self, task: dict[str, np.ndarray]) -> pa.Table:
            rows = super().__call__(task)
            return pa.concat_tables([rows.slice(1, 1), rows.slice(1)])

    class Steps(StepsInOrder):
        def configure(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            # In Ray Train's controller, a process of this run alone.
            setattr(pipeline, "ReadSteps", Reads)  # noqa: B010 (mypy refuses the assignment)
            return super().configure(*args, **kwargs)

    monkeypatch.setattr(driver, "StepsInOrder", Steps)
    said = "^training epoch 1 saw other rows than planned: rows were lost or repeated"
    rows = write_sample(tmp_path / "rows.parquet", 500)
    with pytest.raises(RunError, match=said):
        train_here(data=rows, storage_path=tmp_path, epochs=2, num_workers=2)


@pytest.fixture
def small_store() -> Iterator[None]:
    """A cluster whose object store has the smallest size that Ray takes, 75 MiB."""
    ray.shutdown()
    start_cluster(num_cpus=2, object_store_memory=75 * 2**20)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("small_store")
def test_rows_that_do_not_fit_the_object_store_are_spilled_and_bad_ones_left_out(
    tmp_path: Path,
) -> None:
    """112 MiB, of which 49 of 50 rows are bad."""
    random, rows = np.random.default_rng(0), np.arange(150_000)
    images = pixels_array(random.integers(0, 256, (3_000, 28, 28), np.uint8))
    images = images.take(pa.array(rows // 50, mask=rows % 50 > 0))
    table = pa.table({"image": images, "digit": random.integers(0, 10, len(rows))})
    file = tmp_path / "rows.parquet"
    pq.write_table(table, file)
    said = rf"^--data {file}: 147,000 of 150,000 rows .* rows\.parquet: row 1: the image is null; "
    with pytest.raises(RequestError, match=said):
        loaded(file)
    data = loaded(file, skip_bad_rows=True)
    trained = sorted(row[0] for batch in together(feed(data, first=1)) for row in batch)
    assert sorted([*trained, *data.validation, *data.test]) == rows[::50].tolist()
    assert trained == data.order.ids.tolist()
    address = ray.get_runtime_context().gcs_address
    assert "Spilled " in memory_summary(address, stats_only=True)
