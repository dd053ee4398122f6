"""The driver of a scoring run with so many files as no disk of a test holds: `python -m tests.scoring.synthetic 100000 13`.

Listings and stamps are made up, in this process; plan, resume and reconcile are those of the driver.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import Inputs
from mnistsum_ray.scoring import output
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, PART_SCHEMA, make_tasks, split_into_parts
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA, Plan
from mnistsum_ray.storage.location import Entry, Location
from tests.conftest import writable
from tests.scoring.conftest import CONSOLE

ROWS = 8_192


def input_files(count: int, parts: int) -> pa.Table:
    """FOOTER_SCHEMA of files with so many parts of 8,192 rows each."""
    rows, digits = parts * ROWS, pa.array([f"{index:064x}" for index in range(count)])
    columns = {"size": 800 * rows, "modified": 10**18, "rows": rows, "longest_group": ROWS, "bytes": 800 * rows}
    names = pa.array([f"day={index % 365:03d}/part-{index:07d}.parquet" for index in range(count)])
    table = {"name": names, "footer_sha256": digits, "error": pa.nulls(count, pa.string())}
    table |= {name: pa.repeat(value, count) for name, value in columns.items()}
    return pa.table({name: table[name] for name in FOOTER_SCHEMA.names}, FOOTER_SCHEMA).sort_by("name")


def main(count: int, parts_of_file: int) -> Iterator[dict[str, Any]]:
    """Yield the phases, each with its seconds and the largest memory of the process so far."""
    started = time.process_time()

    def phase(name: str, **fields: Any) -> dict[str, Any]:
        nonlocal started
        before, started = started, time.process_time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"phase": name, "seconds": round(started - before, 1), "MiB": round(memory)} | fields

    place = Location(pafs.LocalFileSystem(), "/synthetic", "/synthetic")
    files = input_files(count, parts_of_file)
    yield phase("begin")
    table, errors = split_into_parts(files, ROWS)
    assert (table.num_rows, errors) == (count * parts_of_file, {})
    inputs = Inputs(place, files.select(["name", "size", "modified"]), {}, {})
    config = ScoreConfig(model="m", input=("i",), output="o")
    card = {"sha256": "0" * 64, "epoch": 1, "parameters": 1}
    plan = Plan(config, place, card, {}, inputs, place, files, table, "fp32", writable(place), False)
    yield phase("plan", parts=table.num_rows)
    tasks = make_tasks(table, CPU_TASK_ROWS, workers=64)
    yield phase("tasks", tasks=len(tasks))

    counts = RowCounts(digits=[819] * 10, numbers=[819] * 10, unsure=[[0.1, "a", 1, 2, 3, 4, "x" * 400]] * 5)
    text = counts.as_json()
    counted = {name.as_py() for name in files["name"][::38]}  # one part in 500: the tasks on the cluster add up the others
    spec = {"source": "s3://bucket/in", "rejected": 0, "spec": plan.spec, "max_rows_per_file": None}
    stamps: Iterator[dict[str, Any]]

    def all_stamps() -> Iterator[dict[str, Any]]:
        for batch in table.select(PART_SCHEMA.names).to_batches(max_chunksize=1000):
            yield from batch.to_pylist()

    def read_stamp(folder: Location, name: str, size: int) -> tuple[dict[str, Any], int, str]:
        stamp = next(stamps)
        assert name.endswith(stamp["output"])
        return stamp | spec, ROWS, text if stamp["first_row"] == 0 and stamp["name"] in counted else "{}"

    def map_files(read: Callable[..., pa.Table], folder: Location, files: pa.Table, progress: Any) -> pa.Table:
        nonlocal stamps
        stamps = all_stamps()
        return pa.concat_tables([read(folder, files.slice(start, 500)) for start in range(0, max(1, files.num_rows), 500)])

    def listed(folder: Location) -> list[Entry]:
        return [Entry(f"/synthetic/predictions/{name}", 400_000, 10**18) for name in names]

    names: list[str] = []
    with (
        patch.object(output, "read_stamp", read_stamp),
        patch.object(output, "map_files", map_files),
        patch.object(Location, "files", listed),
    ):
        plan, committed = output.resume(plan, CONSOLE)
        assert committed.todo.num_rows == table.num_rows
        yield phase("resume, nothing there")
        names = table["output"].to_pylist()
        found = output.OutputFiles.read(plan.output, plan, CONSOLE)
        yield phase("stamps")
        result = output.reconcile(plan, found.stamps)
        assert pc.sum(result["scored"]).as_py() == count * parts_of_file * ROWS
        assert sum(found.counts.digits) == 8190 * len(counted)
        del found, result
        yield phase("reconcile")
        plan, committed = output.resume(plan, CONSOLE)
        assert committed.todo.num_rows == 0
        yield phase("resume, all there")


if __name__ == "__main__":
    for done in main(int(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps(done), flush=True)
