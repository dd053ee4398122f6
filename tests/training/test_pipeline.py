"""Tasks of the readers, and the fingerprint of the rows.

The rows themselves: tests/integration/test_rows.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from mnistsum_ray.data.order import TrainingOrder
from mnistsum_ray.data.sources import Block, open_source
from mnistsum_ray.training.pipeline import tasks
from mnistsum_ray.training.rows import load_blocks


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.parametrize("workers", [1, 2, 3, 30])
@pytest.mark.parametrize("batch_size", [1000, 20_000])
def test_tasks_are_all_steps_of_the_epochs_in_order_and_each_has_rows_for_each_rank(
    workers: int, batch_size: int
) -> None:
    """The last batch has one row: a task of it alone would have none for most ranks."""
    for steps in range(1, 60):
        ids = np.arange((steps - 1) * batch_size + 1)
        order = TrainingOrder(ids, np.array([0, len(ids)]), batch_size, seed=0)
        found = tasks(order, range(4, 6), workers)
        read = []
        for task in found:
            read += [(task["epoch"], step) for step in range(task["start"], task["end"])]
        assert read == [(epoch, step) for epoch in (4, 5) for step in range(steps)]
        assert steps == 1 or steps - 1 not in [task["start"] for task in found]


@pytest.mark.usefixtures("cluster")
def test_the_fingerprint_is_that_of_a_copy_and_not_of_other_pixels_digits_or_splits(
    write_rows: Callable[[int], Path], tmp_path: Path
) -> None:
    source = open_source(str(write_rows(500)))
    (block,) = source.groups[0].blocks()
    copy = tmp_path / "other name.parquet"
    pq.write_table(pq.read_table(source.location), copy, row_group_size=7)
    sources = [
        source,
        replace(source, groups=[Block(block.images ^ np.uint8(1), block.digits, {})]),
        replace(source, groups=[Block(block.images, (block.digits + 1) % 10, {})]),
        replace(source, validation=source.test, test=source.validation),
        replace(source, train=source.train[1:]),
        open_source(str(copy)),
    ]
    *different, last = [load_blocks(each, skip_bad_rows=False)[2] for each in sources]
    assert last == different[0]
    assert len(set(different)) == len(different)
