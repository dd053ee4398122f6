"""Files written by other libraries: each is scored the same, and each library reads the output."""

import io
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

from mnistsum_ray.data.images import Pixels, one_chunk, pixels_array, pixels_view
from mnistsum_ray.data.order import random_numbers
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import Scored, score_here

ROWS = 60

pytestmark = pytest.mark.usefixtures("cluster")


def png(image: Pixels) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def rows(sample: pa.Table) -> tuple[Pixels, np.ndarray]:
    images = pixels_view(one_chunk(sample["image"].take(pa.array(np.arange(ROWS) * 83))))
    return images, random_numbers(0, 0, np.arange(ROWS))


def write_with_pyarrow(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    count, raw = len(numbers), [image.tobytes() for image in images]
    lists, numbers_ = images.reshape(count, -1).tolist(), pa.array(numbers)
    extras = {
        "text": [None if row % 7 == 0 else f"row {row}" for row in range(count)],
        "tags": [[f"t{row}"] * (row % 3) for row in range(count)],
        "deep": [{"a": [{"b": row, "c": None}], "d": {"e": row / 2}} for row in range(count)],
        "map": pa.array([[(f"k{row}", row)] for row in range(count)], pa.map_(pa.string(), pa.int64())),
        "when": pa.array([row * 10**9 for row in range(count)], pa.timestamp("ns", "UTC")),
        "price": pa.array(list(range(count))).cast(pa.decimal128(30, 4)),
        "category": pa.array(["x", "y", None] * (count // 3)).dictionary_encode(),
        "large": pa.array(["l"] * count, pa.large_string()),
    }
    large_lists = pa.array(lists, pa.large_list(pa.int16()))
    dictionary = pa.array([png(image) for image in images]).dictionary_encode()
    doubled = pa.table({"image": np.repeat(np.array(raw, object), 2), "number": np.repeat(numbers, 2)})
    sliced = pa.concat_tables([doubled.slice(2 * row, 1) for row in range(count)])
    forms: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({"image": pixels_array(images), "number": numbers_.cast(pa.int8())}, {}),
        "extras": (
            {"number": numbers_.cast(pa.uint64()), "image": pa.array(lists), **extras},
            {"row_group_size": 7, "compression": "zstd"},
        ),
        "large_lists": ({"image": large_lists, "number": numbers_.cast(pa.uint16())}, {"compression": "gzip"}),
        "large_binary": (
            {"image": pa.array(raw, pa.large_binary()), "number": numbers_.cast(pa.int32())},
            {"compression": "none"},
        ),
        "dictionaries": ({"image": dictionary, "number": numbers_.dictionary_encode()}, {"compression": "brotli"}),
        "sliced": ({name: sliced[name] for name in sliced.column_names}, {"compression": "lz4", "row_group_size": 13}),
        "tensor": ({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "number": numbers_}, {}),
    }
    for name, (columns, options) in forms.items():
        pq.write_table(pa.table(columns), folder / f"pyarrow_{name}.parquet", **options)


def write_with_others(folder: Path, images: Pixels, numbers: np.ndarray) -> None:
    """With pandas, Polars, DuckDB, Hugging Face datasets and Ray Data."""
    count, pngs = len(numbers), [png(image) for image in images]
    flat = images.reshape(count, -1)
    frame = pd.DataFrame({"image": list(flat), "number": pd.array(numbers, "Int64")})
    frame.index = pd.Index([f"id{row}" for row in range(count)], name="key")
    frame.to_parquet(folder / "pandas_lists.parquet")
    nested = pd.DataFrame({"image": images.tolist(), "number": numbers.astype(np.int16)})
    nested.to_parquet(folder / "pandas_nested.parquet")

    arrays = pl.Series("image", flat, dtype=pl.Array(pl.UInt8, 784))
    pl.DataFrame([arrays, pl.Series("number", numbers, dtype=pl.UInt8)]).write_parquet(folder / "polars_arrays.parquet")
    binary = pl.DataFrame({"image": pngs, "number": numbers})
    binary.write_parquet(folder / "polars_binary.parquet", row_group_size=17)

    connection = duckdb.connect()
    connection.register("lists", pa.table({"image": flat.tolist(), "number": numbers}))
    connection.register("blobs", pa.table({"image": [image.tobytes() for image in images], "number": numbers}))
    for name, columns in (
        ("lists", "image::UTINYINT[] AS image, number::TINYINT AS number"),
        ("blobs", "image, number::UBIGINT AS number"),
    ):
        connection.execute(f"COPY (SELECT {columns} FROM {name}) TO '{folder}/duckdb_{name}.parquet' (FORMAT parquet)")

    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int8")})
    values = {"image": [Image.fromarray(image) for image in images], "number": numbers}
    datasets.Dataset.from_dict(values, features).to_parquet(folder / "huggingface.parquet")

    ids = ray.data.range(len(images), override_num_blocks=1)
    tensors = ids.map_batches(lambda rows: {"image": images[rows["id"]], "number": numbers[rows["id"]]}, batch_size=None)
    tensors.write_parquet(str(folder / ".ray"))
    (written,) = (folder / ".ray").glob("*.parquet")
    written.rename(folder / "ray_tensors.parquet")


@pytest.fixture(scope="module")
def scored(model: Path, rows: tuple[Pixels, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("forms")
    (folder / "in").mkdir()
    write_with_pyarrow(folder / "in", *rows)
    write_with_others(folder / "in", *rows)
    return score_here(model, folder / "out", folder / "in", max_rows_per_file=25)


def parts(scored: Scored, name: str) -> pa.Table:
    files = sorted((scored.output / "predictions").glob(f"{name}-0*.parquet"))
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


def test_predictions_equal_those_of_plain_pytorch(scored: Scored, model: Path, rows: tuple[Pixels, np.ndarray]) -> None:
    expected = plain_predictions(model, *rows)
    assert len(scored.files()) == 15
    for name, file in scored.files().items():
        assert (file["rows"], file["scored"], file["rejected"], file["status"]) == (ROWS, ROWS, 0, "scored"), file
        check_predictions(parts(scored, Path(name).stem), expected)
    assert scored.complete
    assert scored.line["input_rows"] == scored.line["scored_rows"] == ROWS * scored.line["files"]


def test_every_other_column_passes_through_unchanged(scored: Scored) -> None:
    source = pq.read_table(scored.output.parent / "in" / "pyarrow_extras.parquet")
    result = parts(scored, "pyarrow_extras")
    kept = source.drop_columns(["image"])
    assert result.column_names == [*kept.column_names, "pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
    assert list(map(str, result.schema.types[-5:])) == ["int8", "float", "int8", "float", "bool"]
    for name in kept.column_names:
        assert result.schema.field(name).type == kept.schema.field(name).type, name
        assert result[name].to_pylist() == kept[name].to_pylist(), name


def test_the_index_of_pandas_passes_through(scored: Scored) -> None:
    files = sorted((scored.output / "predictions").glob("pandas_lists-0*.parquet"))
    assert pd.concat([pd.read_parquet(file) for file in files]).index.tolist() == [f"id{row}" for row in range(ROWS)]


def test_the_output_has_plain_types_only(scored: Scored) -> None:
    for file in (scored.output / "predictions").glob("*.parquet"):
        schema = pq.ParquetFile(file).schema_arrow
        assert not [field for field in schema if isinstance(field.type, pa.BaseExtensionType)], file
