"""Every row of every input file is in exactly one part, and every part has an output file name of its own and is in one task."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, GPU_TASK_ROWS, make_tasks, split_into_parts
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA


def input_files(*rows: int, row_bytes: int = 800, names: list[str] | None = None, group: int = 2**30) -> pa.Table:
    """Files with these numbers of rows, each in row groups of `group` rows."""
    identity = {"size": 1, "modified": 2, "footer_sha256": "x" * 64}
    names = names or [f"f{index}.parquet" for index in range(len(rows))]
    files = [
        identity | {"name": name, "rows": count, "longest_group": min(count, group), "bytes": count * row_bytes}
        for name, count in zip(names, rows, strict=True)
    ]
    return pa.Table.from_pylist(files, FOOTER_SCHEMA)


@pytest.mark.parametrize(("count", "max_rows_per_file"), [(0, 7), (5, 7), (5, 1), (3504, 100)])
def test_parts_cover_the_rows_in_order_within_the_limit(count: int, max_rows_per_file: int) -> None:
    parts, errors = split_into_parts(input_files(count), max_rows_per_file)
    assert not errors
    position = 0
    for part in parts.to_pylist():
        assert part["first_row"] == position
        assert part["rows"] <= max_rows_per_file
        position += part["rows"]
    assert position == count
    outputs = parts["output"].to_pylist()
    assert sorted(set(outputs)) == outputs, "distinct, and in the order of the rows"
    assert (outputs == ["f0.parquet"]) == (count <= max_rows_per_file)


@pytest.mark.parametrize(
    ("rows", "group", "max_rows_per_file", "sizes"),
    [
        (2_000, 300, 1_000, [900, 900, 200]),
        (2_000, 999, 1_000, [999, 999, 2]),
        (2_000, 1_000, 1_000, [1_000, 1_000]),
        (2_000, 1_500, 1_000, [1_000, 1_000]),
        # By default a quarter of the file within limits.
        (8_000, 1_024, None, [8_000]),
        (20_000, 1_024, None, [8_192, 8_192, 3_616]),
        (100_000, 1_024, None, [24_576] * 4 + [1_696]),
        (1_000_000, 1_024, None, [32_768] * 30 + [16_960]),
    ],
)
def test_parts_are_whole_row_groups_where_these_fit(
    rows: int, group: int, max_rows_per_file: int | None, sizes: list[int]
) -> None:
    for count in (1, 2):  # a new file changes no other's parts
        parts, _ = split_into_parts(input_files(*[rows] * count, group=group), max_rows_per_file)
        assert parts["rows"].to_pylist() == sizes * count


@pytest.mark.parametrize(("row_bytes", "most"), [(2**20, 128), (2**52, 8)])
def test_a_part_is_bounded_in_bytes_too_but_not_by_a_footer_that_lies(row_bytes: int, most: int) -> None:
    parts, _ = split_into_parts(input_files(1000, row_bytes=row_bytes), 16_384)
    assert most / 2 < max(parts["rows"].to_pylist()) <= most


def test_a_name_that_is_taken_hidden_or_outside_of_the_output_is_an_error() -> None:
    outside = ["../a.parquet", "b/../../c.parquet", ".."]  # an object store allows such keys; a disk does not
    names = ["deep/a-00000-of-00002.pq", "d..parquet", "deep/a.pq", "_b.parquet", "_d/b.parquet", ".c.parquet", *outside]
    parts, errors = split_into_parts(input_files(1, 1, 20, 1, 1, 1, 1, 1, 1, names=names), 10)
    assert parts["output"].to_pylist() == names[:2]
    assert set(errors) == {*names[2:]}
    assert "need the name deep/a-00000-of-00002.pq in the output, as does deep/a-00000-of-00002.pq" in errors["deep/a.pq"]
    assert {errors[name] for name in outside} == {"would be written outside of the output; rename it"}


@pytest.mark.parametrize(("length", "rows", "fits"), [(255, 5, True), (240, 30, True), (241, 30, False)])
def test_a_name_that_gets_too_long_is_an_error_of_that_file(length: int, rows: int, *, fits: bool) -> None:
    name = "x" * (length - len(".parquet")) + ".parquet"
    parts, errors = split_into_parts(input_files(rows, 5, names=[name, "b.parquet"]), 10)
    assert "b.parquet" in parts["output"].to_pylist()
    assert errors == ({} if fits else {name: "its output's name would have 256 bytes, and most systems allow 255; rename it"})


@pytest.mark.parametrize("workers", [1, 16])
@pytest.mark.parametrize(
    "sizes",
    [
        [10] * 2000,  # many small files
        [1250] * 8,  # a few
        [1_000_000],  # one long row group, which each task reads from its start
        [10, 50_000, 10, 16_384, 0, 40_003],
    ],
    ids=len,
)
def test_tasks_hold_every_part_once_and_in_order(sizes: list[int], workers: int) -> None:
    parts, _ = split_into_parts(input_files(*sizes), 16_384)
    tasks = make_tasks(parts, CPU_TASK_ROWS, workers)
    assert pa.concat_tables([parts.slice(task["first"], task["count"]) for task in tasks]).equals(parts)
    assert min(8, 2 * workers) <= len(tasks) <= max(16, 4 * workers)
    if sizes == [1_000_000]:
        assert len(tasks) == min(16, 4 * workers)


@pytest.mark.parametrize(
    ("files", "max_rows_per_file", "task_rows", "workers", "least", "most"),
    [
        (input_files(100_000), 10, CPU_TASK_ROWS, 16, 9, 17),  # small parts of one row group
        (input_files(10**7, group=8_192), 8_192, GPU_TASK_ROWS, 8, 36, 39),  # long tasks of a GPU
        (input_files(*[10**8] * 30, group=65_536), 65_536, CPU_TASK_ROWS, 64, 10_000, 16_384),
    ],
    ids=["few", "long", "not too many"],
)
def test_number_of_tasks(files: pa.Table, max_rows_per_file: int, task_rows: int, workers: int, least: int, most: int) -> None:
    parts, _ = split_into_parts(files, max_rows_per_file)
    assert least <= len(make_tasks(parts, task_rows, workers)) <= most


@pytest.mark.nightly
def test_a_million_output_files_fit_into_the_driver() -> None:
    """Nothing grows faster than the number of files; 1.3 million take 1.9 GB, and two minutes of CPU time."""
    command = [sys.executable, "-m", "tests.scoring.synthetic"]
    phases = []
    for files in (1_000, 20_000):
        done = subprocess.run([*command, str(files), "13"], check=True, capture_output=True, text=True)
        phases.append([json.loads(line) for line in done.stdout.splitlines()])
    few, many = ({name: sum(phase[name] for phase in of) for name in ("seconds", "MiB")} for of in phases)
    parts = 13 * (20_000 - 1_000)
    memory = (phases[1][-1]["MiB"] - phases[0][-1]["MiB"]) * 2**20 / parts
    seconds = (many["seconds"] - few["seconds"]) / parts
    assert memory < 2 * 1024
    assert seconds < 0.001
