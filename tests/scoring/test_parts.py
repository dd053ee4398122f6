"""Every row of every input file is in exactly one part, and every part in one task."""

import itertools

import pytest

from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.parts import make_tasks, split_into_parts
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
    both, count = [*split_into_parts(input_files(rows, rows), most).values()], len(sizes)
    assert [part.rows for part in both] == sizes * 2, "a file changes no other's parts"
    parts = both[:count]
    assert [part.first_row for part in parts] == [0, *itertools.accumulate(sizes[:-1])]
    names = [f"f0-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    assert [part.output for part in parts] == (names if count > 1 else ["f0.parquet"])


NAMES = [
    (
        ["deep/a-00000-of-00002.pq", "d..x", "deep/a.pq"],
        "deep/a-0.*pq and deep/a.pq need",
    ),
    (["b", "a-00001-of-00002.pq/deep/x", "a.pq"], "a.pq needs the name of a folder of a-00001-of"),
]


@pytest.mark.parametrize(("names", "said"), NAMES)
def test_names_that_the_output_cannot_have_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=f"^--input: {said}"):
        split_into_parts(input_files(1, 1, 20, names=names), 10)


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
    parts = [*split_into_parts(files, None).values()]
    tasks = make_tasks(parts, max_rows, workers)
    assert [*itertools.chain(*tasks)] == parts
    assert least <= len(tasks) <= most
