"""Every row of every input file is in exactly one part, and every part has an output file name of its own and is in one task."""

import time

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, GPU_TASK_ROWS, make_tasks, split_into_parts
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA


def input_files(*rows: int, row_bytes: int = 800, names: list[str] | None = None, group: int = 2**30) -> pa.Table:
    """Files with these numbers of rows, each in row groups of `group` rows."""
    identity = {"size": 1, "modified": 2, "footer_sha256": "x"}
    names = names or [f"f{index}.parquet" for index in range(len(rows))]
    files = [
        identity | {"name": name, "rows": count, "longest_group": min(count, group), "bytes": count * row_bytes}
        for name, count in zip(names, rows, strict=True)
    ]
    return pa.Table.from_pylist(files, FOOTER_SCHEMA)


@pytest.mark.parametrize(("count", "max_rows_per_file"), [(0, 7), (5, 7), (5, 1), (1000, 1), (3504, 100)])
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
    ("group", "sizes"), [(300, [900, 900, 200]), (1000, [1000, 1000]), (1500, [1000, 1000]), (999, [999, 999, 2])]
)
def test_parts_are_whole_row_groups_where_these_fit(group: int, sizes: list[int]) -> None:
    parts, _ = split_into_parts(input_files(2000, group=group), 1000)
    assert parts["rows"].to_pylist() == sizes


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


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_with_the_name_of_a_folder_is_an_error_of_the_one_that_comes_later(*, reverse: bool) -> None:
    """The folder may also be one above the last. On an object store both names may exist."""
    names = ["deep/a-00000-of-00003.parquet/b/c.parquet", "deep/a.parquet"][:: -1 if reverse else 1]
    _, errors = split_into_parts(input_files(*([30, 1] if reverse else [1, 30]), names=names), 10)
    said = f"would need the name deep/a-00000-of-00003.parquet in the output, as does {names[0]}; rename it"
    assert errors == {names[1]: said}


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


def test_many_small_parts_of_one_row_group_are_few_tasks() -> None:
    parts, _ = split_into_parts(input_files(100_000), 10)
    assert 8 < len(make_tasks(parts, CPU_TASK_ROWS, workers=16)) <= 17


def test_a_task_of_a_gpu_is_large_whatever_an_output_file_holds() -> None:
    parts, _ = split_into_parts(input_files(10_000_000, group=8_192), 8_192)
    tasks = make_tasks(parts, GPU_TASK_ROWS, workers=8)
    rows = [sum(parts["rows"][task["first"] : task["first"] + task["count"]].to_pylist()) for task in tasks]
    assert min(rows[:-1]) >= GPU_TASK_ROWS


@pytest.mark.slow
def test_a_million_files_are_planned_in_time() -> None:
    """Nothing in planning grows faster than the number of files."""
    count, rows, limit_seconds = 1_000_000, 1_000, 70  # of CPU time; three times what was measured
    columns = {"size": 800_000, "modified": 1, "rows": rows, "longest_group": rows, "bytes": 800_000, "footer_sha256": "0" * 64}
    files = pa.table(
        {
            "name": pa.array([f"day={index % 365:03d}/part-{index:07d}.parquet" for index in range(count)]),
            **{name: pa.repeat(value, count) for name, value in columns.items()},
            "error": pa.nulls(count, pa.string()),
        }
    )
    started = time.process_time()
    parts, errors = split_into_parts(files, 100_000)
    tasks = make_tasks(parts, CPU_TASK_ROWS, workers=64)
    seconds = time.process_time() - started
    assert not errors
    assert parts.num_rows == sum(task["count"] for task in tasks) == count
    assert max(task["count"] for task in tasks) * rows <= CPU_TASK_ROWS
    assert seconds < limit_seconds
    print(f"planned {count:,} files in {seconds:.1f} s")
