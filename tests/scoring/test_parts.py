"""Every row of every input file is in exactly one part, and every part in one task."""

import itertools

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import from_row, make_tasks, split_into_parts, to_row
from mnistsum_ray.scoring.request import InputFile
from mnistsum_ray.storage.store import Entry

ENTRY = Entry("file", 9, "e")


def input_files(*rows: int, names: list[str] | None = None) -> list[InputFile]:
    names = names or [f"f{index}.parquet" for index in range(len(rows))]
    return [InputFile(name, ENTRY, count) for name, count in zip(names, rows, strict=True)]


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (0, None, [0]),
        (8_193, None, [8_192, 1]),
        (60_001, None, [15_001, 15_001, 15_001, 14_998]),
        (1_000_000, None, [32_768] * 30 + [16_960]),
        (15, 7, [7, 7, 1]),
        (100_000, 10**7, [100_000]),
    ],
)
def test_parts_cover_the_rows_in_order_and_are_of_one_size_but_for_the_last(
    rows: int, most: int | None, sizes: list[int]
) -> None:
    both, failures = split_into_parts(input_files(rows, rows), most)
    parts, count = both[: len(sizes)], len(sizes)
    assert [part.rows for part in both] == sizes * 2, "a file changes no other's parts"
    assert not failures
    assert [part.first_row for part in parts] == [0, *itertools.accumulate(sizes[:-1])]
    names = [f"f0-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    assert [part.output for part in parts] == (names if count > 1 else ["f0.parquet"])


def test_a_name_that_cannot_be_one_of_the_output_costs_that_file_alone() -> None:
    hidden = ["_b.parquet", "_d/b.parquet", "d/.c.parquet", "../a.parquet", "b/../../c.parquet"]
    names = ["deep/a-00000-of-00002.pq", "d..x", "deep/a.pq", *hidden]
    unread = InputFile("unread.parquet", ENTRY, None, error="is empty")
    parts, failures = split_into_parts([*input_files(1, 1, *[20] * 6, names=names), unread], 10)
    assert [part.output for part in parts] == names[:2]
    taken = "would need the name deep/a-00000-of-00002.pq in the output, as does deep/a-00000-of"
    reasons = [taken, *["readers of Parquet skip"] * 5, "is empty"]
    assert [*failures] == [*names[2:], "unread.parquet"]
    for reason, failure in zip(reasons, failures.values(), strict=True):
        assert reason in failure


@pytest.mark.parametrize(
    ("files", "max_rows", "workers", "least", "most"),
    [
        (input_files(*[10] * 2000), 32_768, 16, 20, 21),  # many small files
        (input_files(10, 50_000, 10, 16_384, 0, 40_003), 32_768, 1, 2, 5),
        (input_files(10**7), 262_144, 8, 32, 39),  # long tasks of a GPU
        (input_files(*[10**8] * 30), 32_768, 64, 10_000, 16_384),
    ],
)
def test_tasks_hold_every_part_once_in_order(
    files: list[InputFile], max_rows: int, workers: int, least: int, most: int
) -> None:
    parts, _ = split_into_parts(files, None)
    tasks = make_tasks(parts, max_rows, workers)
    rows = pa.Table.from_pylist([to_row(number, task) for number, task in enumerate(tasks)])
    assert [*itertools.chain(*map(from_row, rows.to_pylist()))] == parts
    assert least <= len(tasks) <= most
