"""Planning a million input files takes seconds: nothing in it grows faster than the number of files."""

import time

import pyarrow as pa
import pytest

from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, make_tasks, split_into_parts

FILES = 1_000_000
ROWS = 1_000
LIMIT_SECONDS = 70
"""CPU time, three times what was measured: other programs may have the cores meanwhile."""


@pytest.mark.slow
def test_a_million_files_are_planned_in_time() -> None:
    names = pa.array([f"day={index % 365:03d}/part-{index:07d}.parquet" for index in range(FILES)])
    files = pa.table(
        {
            "name": names,
            "size": pa.repeat(pa.scalar(800_000, pa.int64()), FILES),
            "modified": pa.array(range(FILES), pa.int64()),
            "rows": pa.repeat(pa.scalar(ROWS, pa.int64()), FILES),
            "group_rows": pa.ListArray.from_arrays(
                pa.array(range(0, 2 * FILES + 1, 2), pa.int32()), pa.repeat(pa.scalar(ROWS // 2, pa.int64()), 2 * FILES)
            ),
            "bytes": pa.repeat(pa.scalar(800_000, pa.int64()), FILES),
            "footer_sha256": pa.repeat("0" * 64, FILES),
            "error": pa.nulls(FILES, pa.string()),
        }
    )
    started = time.process_time()
    parts, errors = split_into_parts(files, 100_000)
    tasks = make_tasks(parts, CPU_TASK_ROWS, workers=64)
    seconds = time.process_time() - started
    assert not errors
    assert parts.num_rows == FILES
    assert sum(task["count"] for task in tasks) == FILES
    assert max(task["count"] for task in tasks) * ROWS <= CPU_TASK_ROWS
    assert seconds < LIMIT_SECONDS, f"planned {FILES:,} files in {seconds:.1f} s"
    print(f"planned {FILES:,} files in {seconds:.1f} s")
