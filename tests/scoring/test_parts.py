"""Every row of every input file is in exactly one part, and every part has an output file name of its own and is in one task."""

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import make_tasks, split_into_parts
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA


def input_files(*groups: list[int], row_bytes: int = 800, names: list[str] | None = None) -> pa.Table:
    identity = {"size": 1, "modified": 2, "footer_sha256": "x"}
    files = [
        identity | {"name": f"f{index}.parquet", "rows": sum(rows), "group_rows": rows, "bytes": sum(rows) * row_bytes}
        for index, rows in enumerate(groups)
    ]
    for file, name in zip(files, names or (), strict=False):
        file["name"] = name
    return pa.Table.from_pylist(files, FOOTER_SCHEMA)


@pytest.mark.parametrize("max_rows_per_file", [1, 7, 100, 1000, 16_384])
@pytest.mark.parametrize("groups", [[], [0], [5], [1000], [100] * 10, [3, 0, 2500, 1, 1, 999], [10, 0, 10]])
def test_parts_cover_the_rows_in_order_within_the_limit(groups: list[int], max_rows_per_file: int) -> None:
    parts, errors = split_into_parts(input_files(groups), max_rows_per_file)
    assert not errors
    rows = parts.to_pylist()
    position = 0
    starts = [sum(groups[:index]) for index in range(len(groups) + 1)]
    for part in rows:
        assert part["first_row"] == position
        assert part["rows"] <= max_rows_per_file
        if part["rows"]:
            assert starts[part["first_group"]] <= position < starts[part["first_group"] + 1] or not groups[part["first_group"]]
        position += part["rows"]
    assert position == sum(groups)
    assert len({part["output"] for part in rows}) == len(rows) >= 1
    if len(rows) == 1:
        assert rows[0]["output"] == "f0.parquet"


def test_a_part_is_bounded_in_bytes_too() -> None:
    parts, _ = split_into_parts(input_files([1000], row_bytes=2**20), 16_384)
    assert max(parts["rows"].to_pylist()) <= 128


def test_the_names_of_split_files_sort_by_row() -> None:
    parts, _ = split_into_parts(input_files([10, 10, 10], names=["deep/er/x.pq"]), 10)
    assert parts["output"].to_pylist() == [f"deep/er/x-0000{index}-of-00003.pq" for index in range(3)]


def test_a_name_that_is_taken_or_hidden_is_an_error() -> None:
    names = ["a-00000-of-00002.parquet", "a.parquet", "_b.parquet", "_d/b.parquet", ".c.parquet"]
    parts, errors = split_into_parts(input_files([1], [10, 10], [1], [1], [1], names=names), 10)
    assert set(errors) == set(names[1:])
    assert "a-00000-of-00002.parquet" in errors["a.parquet"]
    assert parts["output"].to_pylist() == names[:1]


def test_a_name_outside_of_the_output_folder_is_an_error() -> None:
    """An object store allows such keys; a disk does not."""
    parts, errors = split_into_parts(
        input_files([5], [5], [5], [5], names=["../a.parquet", "b/../../c.parquet", "..", "d..parquet"]), 10
    )
    assert parts["output"].to_pylist() == ["d..parquet"]
    assert set(errors) == {"../a.parquet", "b/../../c.parquet", ".."}
    assert set(errors.values()) == {"would be written outside of the output; rename it"}


@pytest.mark.parametrize(("length", "rows", "fits"), [(255, 5, True), (240, 30, True), (241, 30, False)])
def test_a_name_that_gets_too_long_is_an_error_of_that_file(length: int, rows: int, *, fits: bool) -> None:
    name = "x" * (length - len(".parquet")) + ".parquet"
    parts, errors = split_into_parts(input_files([rows], [5], names=[name, "b.parquet"]), 10)
    assert (name not in errors) is fits
    assert "b.parquet" in parts["output"].to_pylist()
    if not fits:
        assert errors[name] == "its output's name would have 256 bytes, and most systems allow 255; rename it"


def test_one_large_row_group_keeps_all_workers_busy() -> None:
    parts, _ = split_into_parts(input_files([1_000_000]), 8_192)
    tasks = make_tasks(parts, 8_192, 15)
    assert 15 <= len(tasks) <= 16


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize(
    "sizes",
    [
        [[10]] * 2000,  # many small files
        [[1250]] * 8,  # a few
        [[1_000_000]],  # one huge row group
        [[10], [50_000], [10], [16_384] * 5, [0], [40_000, 3]],
    ],
)
def test_tasks_hold_every_part_once_and_in_order(sizes: list[list[int]], workers: int) -> None:
    parts, _ = split_into_parts(input_files(*sizes), 16_384)
    tasks = [parts.slice(task["first"], task["count"]) for task in make_tasks(parts, 16_384, workers)]
    assert pa.concat_tables(tasks).equals(parts)
    for task in tasks:
        names = task["name"].unique()
        assert task.num_rows >= 1
        assert len(names) <= 256
    if sizes == [[1250]] * 8:
        assert len(tasks) >= min(8, workers)
    if sizes == [[1_000_000]]:
        assert len(tasks) == min(16, 4 * workers), "each task reads the row group from its start"


def test_small_files_share_a_task() -> None:
    parts, _ = split_into_parts(input_files(*[[10]] * 2000), 16_384)
    assert len(make_tasks(parts, 16_384, 2)) == 8
