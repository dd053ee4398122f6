"""Files of the libraries that users have are scored alike, and each reads every row once."""

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
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from mnistsum_ray.data.columns.base import Array
from tests.conftest import check_predictions, plain_predictions
from tests.integration.conftest import score_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

ROWS = 60
"""Of each file."""

DAYS = ["day=2026-11-01/a.parquet", "day=2026-11-01/b.parquet", "day=2026-11-02/c.parquet"]
"""Files as Hive partitions them. In each the first BAD numbers are null."""

BAD = 8


@pytest.fixture(scope="module")
def rows(pixels: Array) -> tuple[Array, np.ndarray]:
    return pixels[np.arange(ROWS) * 83], np.arange(ROWS) % 10


def write_with_libraries(folder: Path, images: Array, numbers: np.ndarray) -> None:
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


@pytest.fixture(scope="module")
def predictions(
    model: Path, rows: tuple[Array, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of what was made of the days and of the files of all libraries."""
    folder = tmp_path_factory.mktemp("libraries")
    forms, days = folder / "in" / "forms", folder / "in" / "days"
    forms.mkdir(parents=True)
    write_with_libraries(forms, *rows)
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


def test_files_of_each_library_are_scored(
    predictions: Path, model: Path, rows: tuple[Array, np.ndarray]
) -> None:
    found = {path.stem: pq.ParquetFile(path).read() for path in predictions.glob("forms/*")}
    assert len(found) == 5
    for table in found.values():
        check_predictions(table, plain_predictions(model, *rows))
        assert b"huggingface" not in table.schema.metadata
        assert not [one for one in table.schema if isinstance(one.type, pa.BaseExtensionType)]


def read_with_datasets(folder: str) -> Any:
    # Not in the home folder, and not below the files that other libraries read.
    cache = f"{folder}/../../../cache"
    return datasets.load_dataset(folder, split="train", cache_dir=cache).with_format("arrow")[:]


READERS: dict[str, Callable[[str], Any]] = {
    "pandas": pd.read_parquet,  # by pyarrow.dataset
    "duckdb": lambda folder: duckdb.read_parquet(f"{folder}/**").to_arrow_table(),
    "polars": lambda folder: pl.read_parquet(folder).to_arrow(),
    "datasets": read_with_datasets,
    "ray": lambda folder: ray.data.read_parquet(folder).to_pandas(),
}
"""Ways to read all rows below a folder, as a table of Arrow or a frame of pandas."""


@pytest.mark.parametrize("reader", READERS)
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
