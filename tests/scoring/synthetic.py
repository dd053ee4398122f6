"""The driver of a scoring run with so many files as no disk of a test holds: `python -m tests.scoring.synthetic 100000 13`.

Listings and stamps are made up, in this process; plan, resume and reconcile are those of the driver.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
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
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.storage.location import Entry, Location
from tests.conftest import writable
from tests.scoring.conftest import CONSOLE
from tests.scoring.test_parts import input_files

ROWS = 8_192


def main(count: int, parts_of_file: int) -> Iterator[dict[str, Any]]:
    """Yield the phases, each with its seconds and the largest memory of the process so far."""
    started = time.process_time()

    def phase(name: str) -> dict[str, Any]:
        nonlocal started
        before, started = started, time.process_time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"phase": name, "seconds": round(started - before, 1), "MiB": round(memory)}

    place = Location(pafs.LocalFileSystem(), "/synthetic", "/synthetic")
    input_names = [f"day={index % 365:03d}/part-{index:07d}.parquet" for index in range(count)]
    files = input_files(*[parts_of_file * ROWS] * count, names=sorted(input_names), group=ROWS)
    yield phase("begin")
    table, _ = split_into_parts(files, ROWS)
    inputs = Inputs(place, files.select(["name", "size", "modified"]), {}, {})
    config = ScoreConfig(model="m", input=("i",), output="o")
    card = {"sha256": "0" * 64, "epoch": 1, "parameters": 1}
    plan = Plan(config, place, card, {}, inputs, place, files, table, "fp32", writable(place))
    yield phase("plan")
    make_tasks(table, CPU_TASK_ROWS, workers=64)
    yield phase("tasks")

    text = RowCounts(unsure=[[0.1, "a", 1, 2, 3, 4, "x" * 400]] * 5).as_json()
    counted = {*input_names[::38]}  # one part in 500: the tasks on the cluster add up the others
    of_run = {"source": "s3://bucket/in", "rejected": 0, "spec": plan.spec, "max_rows_per_file": None}
    stamps = (row for batch in table.select(PART_SCHEMA.names).to_batches(max_chunksize=1000) for row in batch.to_pylist())

    def read_stamp(folder: Location, name: str, size: int) -> tuple[dict[str, Any], int, str]:
        stamp = next(stamps)
        return stamp | of_run, ROWS, text if stamp["first_row"] == 0 and stamp["name"] in counted else "{}"

    def map_files(read: Any, folder: Location, files: pa.Table, progress: Any) -> pa.Table:
        return pa.concat_tables([read(folder, files.slice(start, 500)) for start in range(0, max(1, files.num_rows), 500)])

    def listed(folder: Location) -> list[Entry]:
        return [Entry(f"/synthetic/predictions/{name}", 400_000, 10**18) for name in table["output"].to_pylist()]

    with (
        patch.object(output, "read_stamp", read_stamp),
        patch.object(output, "map_files", map_files),
        patch.object(Location, "files", listed),
    ):
        there, todo = output.resume(plan, CONSOLE)
        assert (table.num_rows, todo.num_rows) == (count * parts_of_file, 0)
        yield phase("the same command again")
        result = output.reconcile(plan, there.stamps)
        assert pc.sum(result["scored"]).as_py() == table.num_rows * ROWS
        yield phase("last check")


if __name__ == "__main__":
    for done in main(int(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps(done), flush=True)
