"""Every row of every input file is in exactly one part, and every part in one task."""

import itertools
from typing import Any

import pytest

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.columns import Images
from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.scoring.parts import make_tasks, split_into_parts
from mnistsum_ray.scoring.request import InputFile, ScoreRequest
from mnistsum_ray.storage.store import Entry, Location
from mnistsum_ray.task import Task

PLACE, BUCKET = Location("/place"), Location("key", "s3://bucket")
ENTRY = Entry("file", 9, "e")


class Large(MnistSum):
    """A row has 48 KiB and a number."""

    inputs = MnistSum.inputs | {"image": Images(128, 128, "RGB")}


def request(
    *rows: int,
    most: int | None = None,
    task: type[Task] = MnistSum,
    names: list[str] | None = None,
    group: int = 8192,
    root: Location = PLACE,
) -> ScoreRequest:
    """A request with files of so many rows, and so many in a row group."""
    names = names or [f"f{index}.parquet" for index in range(len(rows))]
    files = []
    for name, count in zip(names, rows, strict=True):
        files.append(InputFile(name, ENTRY, count, groups=tuple(range(0, count, group))))
    given: Any = {"task": task, "model": "m", "input": "i", "output": "o"}
    config = ScoreConfig(**given, max_rows_per_file=most)
    return ScoreRequest(config, task(), (), {}, {}, root, PLACE, files)


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (0, None, [0]),
        (8_193, None, [8_192, 1]),
        (60_001, None, [15_001, 15_001, 15_001, 14_998]),
        (1_000_000, None, [32_768] * 30 + [16_960]),
        (15, 7, [7, 7, 1]),
        (100_000, 2_000_000, [100_000]),
    ],
)
def test_parts_cover_the_rows_in_order_and_are_of_one_size_but_for_the_last(
    rows: int, most: int | None, sizes: list[int]
) -> None:
    both, count = [*split_into_parts(request(rows, rows, most=most)).values()], len(sizes)
    assert [part.rows for part in both] == sizes * 2, "a file changes no other's parts"
    parts = both[:count]
    assert [part.first_row for part in parts] == [0, *itertools.accumulate(sizes[:-1])]
    names = [f"f0-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    assert [part.output for part in parts] == (names if count > 1 else ["f0.parquet"])


def test_a_part_of_large_rows_has_fewer() -> None:
    """They have 8 to 32 MiB of decoded rows."""
    sizes = [part.rows for part in split_into_parts(request(200, 10_000, task=Large)).values()]
    assert sizes[:2] == [170, 30]
    assert sizes[2:] == [682] * 14 + [452]


def test_names_that_the_output_cannot_have_are_refused() -> None:
    names = ["deep/a-00000-of-00002.pq", "deep/a.pq"]
    said = "^--input: deep/a-00000-of-00002.pq and deep/a.pq need one name"
    with pytest.raises(RequestError, match=said):
        split_into_parts(request(1, 20, most=10, names=names))


@pytest.mark.parametrize(
    ("asked", "workers", "least", "most"),
    [
        (request(*[10] * 2000), 16, 5, 5),  # many small files
        (request(10, 50_000, 10, 16_384, 0, 40_003), 1, 2, 5),
        (request(60_000), 16, 4, 8),
        (request(10**7), 8, 50, 80),
        (request(*[10**8] * 30), 64, 10_000, 16_384),
        (request(10**5, task=Large, group=512), 8, 30, 40),
        # A disk gives a group of many rows to each idle worker; a bucket is asked for it once.
        (request(10**6, group=10**6), 2, 2, 2),
        (request(10**6, group=10**6), 16, 16, 16),
        (request(10**6, 10**6, 10**6, group=10**6), 2, 3, 3),
        (request(10**6, group=10**6, root=BUCKET), 16, 1, 1),
    ],
)
def test_tasks_hold_every_part_once_in_order(
    asked: ScoreRequest, workers: int, least: int, most: int
) -> None:
    parts = [*split_into_parts(asked).values()]
    tasks = make_tasks(asked, parts, workers)
    assert [*itertools.chain(*tasks)] == parts
    assert least <= len(tasks) <= most
