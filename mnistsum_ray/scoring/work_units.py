"""Work units: consecutive parts that one task processes, so that its overhead is paid once for many small parts."""

import itertools
from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

_UNITS_PER_WORKER: Final = 4
"""With several units per worker, none has to finish a long one alone at the end."""

# A unit with fewer rows and fewer parts is not worth the overhead of a task.
_MIN_ROWS: Final = 1024
_MIN_PARTS: Final = 8
_MAX_PARTS: Final = 256

_MAX_UNITS_PER_GROUP: Final = 16
"""Each unit reads the row group from its start: with more units they would skip more rows than they score, with fewer, workers
would idle."""


def make_work_units(parts: pa.Table, max_rows_per_file: int, workers: int) -> list[pa.Table]:
    """Group consecutive parts so that each worker gets several units, and no unit has very many rows or parts.

    The slices of one row group go into a few units only, since each unit reads the group from its start.

    Returns:
        Slices of `parts` (`parts.PART_SCHEMA`), in its order.
    """
    wanted = _UNITS_PER_WORKER * workers
    max_rows = min(max_rows_per_file, max(_MIN_ROWS, _ceil_divide(pc.sum(parts["rows"]).as_py() or 0, wanted)))
    max_parts = min(_MAX_PARTS, max(_MIN_PARTS, _ceil_divide(parts.num_rows, wanted)))
    units = []
    for start, end, is_one_group in _ranges(parts):
        if is_one_group:
            step = _ceil_divide(end - start, min(_MAX_UNITS_PER_GROUP, wanted))
            units += [parts.slice(first, min(step, end - first)) for first in range(start, end, step)]
            continue
        rows, first = 0, start
        for index, count in enumerate(parts["rows"].slice(start, end - start).to_pylist(), start):
            if index > first and (rows + count > max_rows or index - first == max_parts):
                units.append(parts.slice(first, index - first))
                rows, first = 0, index
            rows += count
        units.append(parts.slice(first, end - first))
    return units


def _ceil_divide(amount: int, count: int) -> int:
    return -(-amount // count)


def _ranges(parts: pa.Table) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether the parts are slices of one row group, at least two of them), which together cover `parts`."""
    names, first_groups, num_groups = (parts[name].to_pylist() for name in ("name", "first_group", "num_groups"))
    start = 0
    for _, members in itertools.groupby(range(parts.num_rows), key=lambda index: (names[index], first_groups[index])):
        first, *others = members
        if others and num_groups[first] == 1:
            if start < first:
                yield start, first, False
            start = others[-1] + 1
            yield first, start, True
    if start < parts.num_rows:
        yield start, parts.num_rows, False
