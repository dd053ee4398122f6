"""Every row of every input file is in exactly one part, and every part has an output file name of its own and is in one task."""

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
    outside = ["../a.parquet", "b/../../c.parquet"]  # an object store allows such keys; a disk does not
    names = ["deep/a-00000-of-00002.pq", "d..parquet", "deep/a.pq", "_b.parquet", "_d/b.parquet", ".c.parquet", *outside]
    parts, errors = split_into_parts(input_files(1, 1, 20, 1, 1, 1, 1, 1, names=names), 10)
    assert parts["output"].to_pylist() == names[:2]
    assert set(errors) == {*names[2:]}
    assert "need the name deep/a-00000-of-00002.pq in the output, as does deep/a-00000-of-00002.pq" in errors["deep/a.pq"]
    assert {errors[name] for name in outside} == {"would be written outside of the output; rename it"}


@pytest.mark.parametrize(
    ("files", "task_rows", "workers", "least", "most"),
    [
        (input_files(*[10] * 2000), CPU_TASK_ROWS, 16, 20, 21),  # many small files
        (input_files(*[1250] * 8), CPU_TASK_ROWS, 16, 2, 4),  # a few
        (input_files(10, 50_000, 10, 16_384, 0, 40_003), CPU_TASK_ROWS, 1, 2, 5),
        (input_files(10**7, group=8_192), GPU_TASK_ROWS, 8, 36, 39),  # long tasks of a GPU
        (input_files(*[10**8] * 30, group=16_384), CPU_TASK_ROWS, 64, 10_000, 16_384),
    ],
)
def test_tasks_hold_every_part_once_and_in_order(files: pa.Table, task_rows: int, workers: int, least: int, most: int) -> None:
    parts, _ = split_into_parts(files, 16_384)
    tasks = make_tasks(parts, task_rows, workers)
    assert pa.concat_tables([parts.slice(task["first"], task["count"]) for task in tasks]).equals(parts)
    assert least <= len(tasks) <= most
