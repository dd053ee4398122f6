"""Files written by other libraries: each is scored the same, and each library reads the output."""

import io
from collections.abc import Callable
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


Writer = Callable[[Path, Pixels, np.ndarray], None]
WRITERS: dict[str, Writer] = {}


def writer(function: Writer) -> Writer:
    WRITERS[function.__name__] = function
    return function


@writer
def pyarrow_plain(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    pq.write_table(pa.table({"image": pixels_array(images), "number": pa.array(numbers, pa.int8())}), path)


@writer
def pyarrow_nested_extras(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    count = len(numbers)
    extras: dict[str, Any] = {
        "text": [None if row % 7 == 0 else f"row {row}" for row in range(count)],
        "tags": [[f"t{row}"] * (row % 3) for row in range(count)],
        "deep": [{"a": [{"b": row, "c": None}], "d": {"e": row / 2}} for row in range(count)],
        "map": pa.array([[(f"k{row}", row)] for row in range(count)], pa.map_(pa.string(), pa.int64())),
        "when": pa.array([row * 10**9 for row in range(count)], pa.timestamp("ns", "UTC")),
        "price": pa.array(list(range(count))).cast(pa.decimal128(30, 4)),
        "category": pa.array(["x", "y", None] * (count // 3)).dictionary_encode(),
        "large": pa.array(["l"] * count, pa.large_string()),
    }
    table = pa.table({"number": pa.array(numbers, pa.uint64()), "image": pa.array(images.reshape(count, -1).tolist()), **extras})
    pq.write_table(table, path, row_group_size=7, compression="zstd")


@writer
def pyarrow_large_types(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    large = pa.array(images.reshape(len(images), -1).tolist(), pa.large_list(pa.int16()))
    pq.write_table(pa.table({"image": large, "number": pa.array(numbers, pa.uint16())}), path, compression="gzip")


@writer
def pyarrow_large_binary(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    large = pa.array([image.tobytes() for image in images], pa.large_binary())
    pq.write_table(pa.table({"image": large, "number": pa.array(numbers, pa.int32())}), path, compression="none")


@writer
def pyarrow_dictionaries(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    encoded = pa.array([png(image) for image in images]).dictionary_encode()
    pq.write_table(pa.table({"image": encoded, "number": pa.array(numbers).dictionary_encode()}), path, compression="brotli")


@writer
def pyarrow_chunked_and_sliced(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    doubled = pa.table({"image": [image.tobytes() for image in np.repeat(images, 2, axis=0)], "number": np.repeat(numbers, 2)})
    chunks = [doubled.slice(2 * row, 1) for row in range(len(numbers))]
    pq.write_table(pa.concat_tables(chunks), path, compression="lz4", row_group_size=13)


@writer
def pyarrow_tensor(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    pq.write_table(pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "number": numbers}), path)


@writer
def pandas_lists(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    frame = pd.DataFrame({"image": list(images.reshape(len(images), -1)), "number": pd.array(numbers, "Int64")})
    frame.index = pd.Index([f"id{row}" for row in range(len(numbers))], name="key")
    frame.to_parquet(path)


@writer
def pandas_nested(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    pd.DataFrame({"image": images.tolist(), "number": numbers.astype(np.int16)}).to_parquet(path)


@writer
def polars_arrays(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    flat = pl.Series("image", images.reshape(len(images), -1), dtype=pl.Array(pl.UInt8, 784))
    pl.DataFrame([flat, pl.Series("number", numbers, dtype=pl.UInt8)]).write_parquet(path)


@writer
def polars_binary(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    pl.DataFrame({"image": [png(image) for image in images], "number": numbers}).write_parquet(path, row_group_size=17)


@writer
def duckdb_lists(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    table = pa.table({"image": images.reshape(len(images), -1).tolist(), "number": numbers})
    assert table.num_rows  # DuckDB finds it by its name
    duckdb.sql(f"COPY (SELECT image::UTINYINT[] AS image, number::TINYINT AS number FROM 'table') TO '{path}' (FORMAT parquet)")


@writer
def duckdb_blobs(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    table = pa.table({"image": [image.tobytes() for image in images], "number": numbers})
    assert table.num_rows
    duckdb.sql(f"COPY (SELECT image, number::UBIGINT AS number FROM 'table') TO '{path}' (FORMAT parquet, COMPRESSION zstd)")


@writer
def huggingface(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int8")})
    values = {"image": [Image.fromarray(image) for image in images], "number": numbers}
    datasets.Dataset.from_dict(values, features).to_parquet(path)


@writer
def ray_tensors(path: Path, images: Pixels, numbers: np.ndarray) -> None:
    dataset = ray.data.from_numpy([images]).rename_columns({"data": "image"}).zip(ray.data.from_numpy([numbers]))
    folder = path.parent / f".{path.name}"
    dataset.rename_columns({"data": "number"}).repartition(1).write_parquet(str(folder))
    (written,) = folder.glob("*.parquet")
    written.rename(path)


@pytest.fixture(scope="module")
def scored(model: Path, rows: tuple[Pixels, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("forms")
    (folder / "in").mkdir()
    for name, write in WRITERS.items():
        write(folder / "in" / f"{name}.parquet", *rows)
    return score_here(model, folder / "out", folder / "in", max_rows_per_file=25)


def parts(scored: Scored, name: str) -> pa.Table:
    files = sorted((scored.output / "predictions").glob(f"{name}.parquet")) + sorted(
        (scored.output / "predictions").glob(f"{name}-0*.parquet")
    )
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


@pytest.mark.parametrize("name", list(WRITERS))
def test_predictions_equal_those_of_plain_pytorch(
    scored: Scored, model: Path, rows: tuple[Pixels, np.ndarray], name: str
) -> None:
    assert scored.files()[f"{name}.parquet"] | {"reason": None} == {
        "file": f"{name}.parquet",
        "rows": ROWS,
        "scored": ROWS,
        "rejected": 0,
        "status": "scored",
        "reason": None,
    }, scored.files()[f"{name}.parquet"]
    check_predictions(parts(scored, name), plain_predictions(model, *rows))


def test_the_counts_of_the_run(scored: Scored) -> None:
    assert scored.complete
    assert scored.line["input_rows"] == scored.line["scored_rows"] == ROWS * len(WRITERS)
    assert scored.line["files"] == len(WRITERS)


def test_every_other_column_passes_through_unchanged(scored: Scored) -> None:
    source = pq.read_table(scored.output.parent / "in" / "pyarrow_nested_extras.parquet")
    result = parts(scored, "pyarrow_nested_extras")
    kept = source.drop_columns(["image"])
    assert result.column_names == [*kept.column_names, "pred_digit", "digit_prob", "pred_sum", "sum_prob", "consistent"]
    assert list(map(str, result.schema.types[-5:])) == [
        "int8",
        "float",
        "int8",
        "float",
        "bool",
    ]
    for name in kept.column_names:
        assert result.schema.field(name).type == kept.schema.field(name).type, name
        assert result[name].to_pylist() == kept[name].to_pylist(), name


def test_the_output_opens_in_polars_duckdb_pandas_and_datasets(scored: Scored) -> None:
    for name in WRITERS:
        files = [
            str(file)
            for file in [
                *(scored.output / "predictions").glob(f"{name}.parquet"),
                *(scored.output / "predictions").glob(f"{name}-0*.parquet"),
            ]
        ]
        assert len(pl.concat([pl.read_parquet(file) for file in files])) == ROWS
        assert duckdb.connect().execute(f"SELECT count(*), count(pred_sum) FROM read_parquet({files})").fetchall() == [
            (ROWS, ROWS)
        ]
        assert len(pd.concat([pd.read_parquet(file) for file in files])) == ROWS
    (hugging,) = {
        len(datasets.Dataset.from_parquet(sorted(map(str, (scored.output / "predictions").glob("huggingface-0*.parquet")))))
    }
    assert hugging == ROWS
    assert pd.concat(
        [pd.read_parquet(file) for file in sorted((scored.output / "predictions").glob("pandas_lists-0*.parquet"))]
    ).index.tolist() == [f"id{row}" for row in range(ROWS)]


def test_the_output_has_plain_types_only(scored: Scored) -> None:
    for file in (scored.output / "predictions").glob("*.parquet"):
        schema = pq.ParquetFile(file).schema_arrow
        assert not [field for field in schema if isinstance(field.type, pa.BaseExtensionType)], file
