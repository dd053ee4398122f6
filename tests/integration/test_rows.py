"""The rows of a training: each once, with what is its own; and what cannot be used is named."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.data.decoding import RowTotals
from mnistsum_ray.data.parquet import to_parquet
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.errors import RequestError, RowCountError
from mnistsum_ray.mnist.network import affine_matrices
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.task import Batch
from mnistsum_ray.training.loop import HeldOutRows
from mnistsum_ray.training.rows import EveryRow, Rows, read_rows, shards_of
from tests.training import CPU, SILENT, as_worker, new_worker, open_data

pytestmark = pytest.mark.usefixtures("cluster")
slow = pytest.mark.slow

COLUMNS = MnistSum().training_columns
IMAGE_TYPE = pa.binary(784)


def marked(rows: int) -> pa.Table:
    """Rows sorted by digit, in whose images the first four bytes say which row it is."""
    pixels = np.zeros((rows, 784), np.uint8)
    pixels[:, :4] = np.arange(rows, dtype="<u4").view(np.uint8).reshape(rows, 4)
    digits = np.arange(rows) * 10 // rows
    images = pa.array([image.tobytes() for image in pixels], IMAGE_TYPE)
    return pa.table({"image": images, "digit": digits})


def marks(images: np.ndarray) -> list[int]:
    """Which rows of `marked` these images are of."""
    flat = np.ascontiguousarray(images.reshape(-1, 784)[:, :4])
    found: list[int] = flat.view("<u4").ravel().tolist()
    return found


def read(data: Path | str, seed: int = 0, columns: Any = (), **settings: Any) -> Rows:
    source = open_data(data, **dict(columns))
    return read_rows(source, COLUMNS, seed, **{"skip_bad_rows": False} | settings)


def rows_of(dataset: Any, total: int) -> list[int]:
    """Which rows of `marked(total)` a Dataset or a shard has, in their order, digits checked."""
    found = []
    for batch in dataset.iter_batches(batch_size=None):
        some = marks(batch["image"])
        assert batch["digit"].tolist() == [row * 10 // total for row in some], "their own digits"
        found += some
    return found


def all_rows(found: Rows, total: int) -> list[int]:
    """Which rows of `marked(total)` all splits have together, sorted."""
    return sorted(chain(*(rows_of(dataset, total) for dataset in found.datasets.values())))


def concat(dataset: Any) -> pa.Table:
    """All rows of a Dataset as one table of one chunk."""
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables(blocks).combine_chunks()


TOTAL = 3011


def write_files(folder: Path) -> None:
    """Rows sorted by digit, in three files with row groups of other sizes each.

    The first file takes longest to read.
    """
    table = marked(TOTAL)
    for first, end, group in ((0, 2311, 999), (2311, 2811, 77), (2811, TOTAL, 200)):
        pq.write_table(table[first:end], folder / f"{first:05}.parquet", row_group_size=group)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def rows(cluster: str, folder: Path) -> Rows:
    return read(folder)


def test_every_row_once_in_the_splits_and_again_in_the_same_order(rows: Rows) -> None:
    splits = {split: rows_of(dataset, TOTAL) for split, dataset in rows.datasets.items()}
    sizes = {split: len(found) for split, found in splits.items()}
    assert sizes == {split: totals.rows for split, totals in rows.totals.items()}
    for split in ("validation", "test"):
        assert 250 < sizes[split] < 350, "about a tenth"
    assert sorted(chain(*splits.values())) == list(range(TOTAL))
    for split, dataset in rows.datasets.items():
        ids = concat(dataset)["row_id"].to_numpy()
        assert rows.totals[split] == RowTotals.of(ids)
        assert len(set(ids)) == len(ids)
        of_digits = np.bincount(np.array(splits[split]) * 10 // TOTAL)
        assert of_digits.min() > len(ids) / 30, "all digits"


def test_the_same_rows_have_the_same_splits_and_fingerprint_in_files_of_other_names(
    rows: Rows, folder: Path, tmp_path: Path
) -> None:
    table = marked(TOTAL)
    pq.write_table(table[1000:], tmp_path / "a.parquet")
    (tmp_path / "b").mkdir()
    pq.write_table(table[:1000], tmp_path / "b" / "c.parquet")
    again = read(tmp_path)
    assert again.totals == rows.totals
    assert again.fingerprint == rows.fingerprint
    for split, dataset in again.datasets.items():
        assert sorted(rows_of(dataset, TOTAL)) == sorted(rows_of(rows.datasets[split], TOTAL))
    one_pixel = bytearray(table["image"][0].as_py())
    one_pixel[500] = 1
    image = pa.array([bytes(one_pixel)], IMAGE_TYPE)
    changed = pa.table({"image": image, "digit": table["digit"][:1]})
    pq.write_table(pa.concat_tables([changed, table[1:1000]]), tmp_path / "b" / "c.parquet")
    assert read(tmp_path).fingerprint != rows.fingerprint


@slow
def test_rows_that_stand_twice_count_twice(tmp_path: Path) -> None:
    table = marked(300)
    pq.write_table(table, tmp_path / "a.parquet")
    once = read(tmp_path)
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "a.parquet")
    twice = read(tmp_path)
    for split, totals in once.totals.items():
        assert twice.totals[split] == totals.plus(totals.rows, totals.id_sum)
    assert all_rows(twice, 300) == sorted([*range(300), *range(300)])


def dealt(rows: Rows, ranks: int) -> list[list[int]]:
    """The training rows of each rank, in their order, read at the same time as in a training."""
    shards = EveryRow().configure({"train": rows.datasets["train"]}, ranks)
    with ThreadPoolExecutor(ranks) as pool:
        return [*pool.map(lambda shard: rows_of(shard["train"], TOTAL), shards)]


@slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_get_all_rows_the_same_ones_each_time_whether_kept_or_read_in_each_epoch(
    rows: Rows, folder: Path, ranks: int
) -> None:
    kept = dealt(rows, ranks)
    expected = sorted(rows_of(rows.datasets["train"], TOTAL))
    assert sorted(chain(*kept)) == expected
    sizes = tuple(map(len, kept))
    assert sizes == shards_of(len(expected), rows.rows_of_block, ranks)
    assert max(sizes) - min(sizes) <= rows.rows_of_block
    again = read(folder, is_kept=False)
    assert again.totals == rows.totals
    for _ in range(2):
        assert dealt(again, ranks) == kept
    if ranks == 1:
        assert dealt(read(folder, seed=1), 1) != kept, "another order of files"


def epochs_of(shard: Any, seed: int) -> list[list[Batch]]:
    """The batches of two epochs that a worker with this shard trains."""
    count = shard.count()

    def feed() -> list[list[Batch]]:
        settings: dict[str, Any] = {"recipe": "long", "batch_size": 100, "seed": seed}
        worker = new_worker(totals=RowTotals(count, 0), **settings)
        return [list(worker._batches(epoch)) for epoch in (0, 1)]

    return as_worker(feed, shard)


def test_a_worker_shuffles_its_shard_anew_in_each_epoch_and_pairs_each_row(rows: Rows) -> None:
    (_, shard) = rows.datasets["train"].split(2)
    expected = rows_of(shard, TOTAL)
    orders = []
    for epoch, batches in enumerate(epochs_of(shard, seed=3)):
        assert [len(batch["digit"]) for batch in batches[:-1]] == [100] * (len(batches) - 1)
        order = []
        for batch in batches:
            ids = batch["row_id"].numpy()
            order += marks(batch["image"].numpy())
            assert batch["digit"].tolist() == [row * 10 // TOTAL for row in order[-len(ids) :]]
            draws = RowRandom(3, epoch, ids)
            assert batch["number"].tolist() == draws.whole(1, 10).tolist()
            matrices = affine_matrices(draws.uniform(4, 6) * 2 - 1, 1.0)
            assert np.array_equal(batch["affine"], matrices)
        assert sorted(order) == sorted(expected)
        orders.append(order)
    assert len({*map(tuple, orders), tuple(expected)}) == 3, "three orders"
    for seed, is_same in ((3, True), (4, False)):
        again = epochs_of(shard, seed)
        found = [[*chain(*(marks(batch["image"].numpy()) for batch in epoch))] for epoch in again]
        assert (found == orders) == is_same


FILES: list[tuple[str, pa.DataType, pa.DataType]] = [
    # Name, with what means something in a URI; type of images; type of labels.
    ("a b/50% ü=1.parquet", IMAGE_TYPE, pa.uint8()),
    ("c%20d/x=y/#2.PQ", pa.large_binary(), pa.float32()),
    ("e/[3]&*.parq", IMAGE_TYPE, pa.string()),
]


@slow
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_files_of_one_folder_may_differ(tmp_path: Path, where: str) -> None:
    uri = f"s3://bucket/{tmp_path.name}/a b" if where == "s3" else str(tmp_path)
    folder = locate(uri, "--data")
    for index, (name, of_images, of_labels) in enumerate(FILES):
        rows = marked(300)[100 * index :][:100]
        columns = {"image": rows["image"].cast(of_images), "digit": rows["digit"].cast(of_labels)}
        columns["path"] = pa.chunked_array([["a column that Ray Data adds too"] * 100])
        (folder / name).write(to_parquet(pa.table(columns)))
    assert all_rows(read(folder.display), 300) == list(range(300))


def test_columns_say_what_is_read_and_neither_folders_nor_other_columns(tmp_path: Path) -> None:
    rows = marked(300)
    for index, other in enumerate([pa.nulls(150, pa.int8()), pa.nulls(150, pa.string())]):
        folder = tmp_path / f"digit={index}" / "digit=3"
        folder.mkdir(parents=True)
        table = rows[150 * index :][:150].append_column("other", other)
        pq.write_table(table.rename_columns({"image": "the picture"}), folder / "a.parquet")
    found = read(tmp_path, columns={"image_column": "the picture"})
    assert all_rows(found, 300) == list(range(300))


def test_bad_rows_are_counted_by_reason_and_named_by_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Data reads the row groups of a file in another order from so many bytes on.
    monkeypatch.setenv("RAY_DATA_PARQUET_BIN_PACKING_BYTES", "100000")
    images = marked(400)["image"].combine_chunks()
    digits = np.arange(400) % 9
    digits[[7, 150, 390]] = 10, -1, 10
    images = pc.if_else(pa.array(np.arange(400) % 200 == 3), None, images)
    table = pa.table({"image": images, "digit": digits})
    pq.write_table(table[:200], tmp_path / "train a.parquet", row_group_size=50)
    pq.write_table(table[200:], tmp_path / "train-c.parquet")
    pq.write_table(table[:0], tmp_path / "test.parquet")  # so its rows are held out, too
    null = "the image is null; fill it in or drop the row"
    wrong = "the digit is {}, not one of 0..9; correct it or drop the row"
    examples = [
        f"train a.parquet: row 3, train-c.parquet: row 3: {null}",
        f"train a.parquet: row 7, train-c.parquet: row 190: {wrong.format(10)}",
        f"train a.parquet: row 150: {wrong.format(-1)}",
    ]
    said = f"--data {tmp_path}: 5 of 400 rows cannot be used: {' | '.join(examples)}; correct them,"
    with pytest.raises(RequestError, match=f"^{re.escape(said)} or train with --skip-bad-rows"):
        read(tmp_path)
    rows = read(tmp_path, skip_bad_rows=True)
    assert rows.rejected.reasons == {null: 2, wrong.format(10): 2, wrong.format(-1): 1}
    assert rows.rejected.describe() == " | ".join(examples)
    left = [marks(batch["image"]) for of in rows.datasets.values() for batch in of.iter_batches()]
    assert sorted(chain(*left)) == [row for row in range(400) if row not in (3, 7, 150, 203, 390)]
    assert 20 < rows.totals["test"].rows < 60, "about a tenth"
    assert rows.missing == {"digit": {9}}


def damage_a_page(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(500) + data[middle + 500 :]


def lie_about_rows(data: bytes) -> bytes:
    """The footer says 101 rows, and the pages hold 100. Both numbers are Thrift's zigzag."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:start] + data[start:].replace(b"\x16\xc8\x01", b"\x16\xca\x01")


UNREADABLE = r"--data .*/b\.parquet: cannot be read: .*"

DAMAGES = [
    ("disk", damage_a_page, UNREADABLE),
    pytest.param("s3", damage_a_page, UNREADABLE, marks=slow),
    ("disk", lie_about_rows, f"{UNREADABLE}|--data .*: read 300 rows of .* hold 301.*"),
]


@pytest.mark.parametrize(("where", "damage", "said"), DAMAGES)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, where: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    """One whose end is missing is refused by its footer: tests/data/test_sources.py."""
    uri = f"s3://bucket/{tmp_path.name}" if where == "s3" else str(tmp_path)
    folder = locate(uri, "--data")
    file = tmp_path / "rows"
    pq.write_table(marked(100), file, write_page_checksum=True)
    whole = file.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    for name, data in (("a", whole), ("b", damaged), ("c", whole)):
        (folder / f"{name}.parquet").write(data)
    with pytest.raises((RequestError, RowCountError)) as error:
        read(folder.display)
    assert re.fullmatch(said, str(error.value))


@pytest.mark.parametrize(("split", "count"), [("train", 1), ("test", 50)])
def test_each_split_needs_rows(split: str, count: int) -> None:
    sample = open_data("sample")
    few = replace(sample, tables={split: sample.tables["train"][:count]})
    said = rf"^--data .*: has too few rows \({count} {split}\); each split needs some"
    with pytest.raises(RequestError, match=said):
        read_rows(few, COLUMNS, seed=0, skip_bad_rows=False)


def test_rows_in_memory_are_named_once_for_one_reason_and_none_are_left_to_train_with() -> None:
    sample = open_data("sample")
    table = sample.tables["train"][:6]
    wrong = replace(sample, tables={"train": table.set_column(1, "digit", pa.array([10] * 6))})
    places = ", ".join(f"sample (train): row {row}" for row in range(5))
    reason = "the digit is 10, not one of 0..9; correct it or drop the row"
    said = f": 6 of 6 rows cannot be used: {places}: {reason} | …; correct them"
    with pytest.raises(RequestError, match=f"{re.escape(said)}$"):
        read_rows(wrong, COLUMNS, seed=0, skip_bad_rows=False)


LOST: list[tuple[str, Callable[[pa.Table], list[pa.Table]]]] = [
    ("saw 199 rows, where the plan has 200: ", lambda rows: [rows[1:]]),
    ("saw 201 rows, where the plan has 200: ", lambda rows: [rows, rows[:1]]),
    ("saw other rows than planned: ", lambda rows: [rows[1:2], rows[1:]]),
]


@pytest.mark.parametrize(("said", "change"), LOST)
def test_a_row_that_is_lost_repeated_or_exchanged_on_its_way_to_a_worker_is_noticed(
    rows: Rows, said: str, change: Callable[[pa.Table], list[pa.Table]]
) -> None:
    some = concat(rows.datasets["train"])[:200]
    totals = RowTotals.of(some["row_id"].to_numpy())

    def train() -> None:
        worker = new_worker(totals=totals)
        with pytest.raises(RowCountError, match=f"^training epoch 1 {said}"):
            worker.train_epoch(0)
        held_out = HeldOutRows(worker.task, "test", totals, CPU, SILENT)
        with pytest.raises(RowCountError, match=f"^evaluation {said}"):
            held_out.evaluate(worker.network, bf16=False)

    as_worker(train, ray.data.from_blocks(change(some)))
