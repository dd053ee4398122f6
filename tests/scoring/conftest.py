"""Scoring in this process: the product's driver, planner, store and worker, without a cluster."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring import job, record
from mnistsum_ray.scoring.actor import Answer, ScoreParts
from mnistsum_ray.scoring.parts import Part
from mnistsum_ray.scoring.request import ScoreRequest, check_request
from mnistsum_ray.task import Task

CONSOLE = Console(io.StringIO())

TIMED = ("manifest.json", "report.html")
"""Files in which the time is."""

_SCORERS: dict[tuple[str, type[Task], int | None], ScoreParts] = {}
"""By model, task and batch: to load one takes longer than to score a few rows."""

OTHERS = {
    # pyarrow cannot take rows of views, and cannot cast a slice of structs with a null child.
    "view": pa.array([None, *"bcdefghij"], pa.string_view()),
    "null_in_a_struct": pa.array([{"a": [{"b": row, "c": None}]} for row in range(10)]),
    "tags": [[f"t{row}"] * (row % 3) for row in range(10)],
    "map": pa.array([[(f"k{row}", row)] for row in range(10)], pa.map_(pa.string(), pa.int64())),
    "when": pa.array([row * 10**9 for row in range(10)], pa.timestamp("ns", "UTC")),
    "price": pa.array(range(10)).cast(pa.decimal128(30, 4)),
}
"""Columns that are passed on."""


def score_without_ray(
    request: ScoreRequest, _workers: WorkerPlan, tasks: Sequence[Sequence[Part]], _console: Console
) -> Iterator[Answer]:
    """What actors do with tasks, which are rows of a table, in this process."""
    key = (request.config.model, type(request.task), request.config.batch_size)
    if key not in _SCORERS:
        _SCORERS[key] = ScoreParts(request, "cpu")
    actor = _SCORERS[key]
    actor._request = request
    for number, task in enumerate(tasks):
        row = {"task": number, "parts": [part._asdict() for part in task]}
        for answers in actor(pa.Table.from_pylist([row])):
            yield from (Answer(**row) for row in answers.to_pylist())


def score(patch: pytest.MonkeyPatch, execute: Any = score_without_ray, **given: Any) -> ScoreResult:
    """Score on a machine of two CPUs, without Ray."""
    two_cpus = ClusterResources(({"CPU": 2.0},))
    found = {"has_usable_gpu": lambda *_: False, "inspect_cluster": lambda: two_cpus}
    patch.setattr(job, "resources", SimpleNamespace(**found))
    patch.setattr(job, "score_on_ray", execute)
    return job.score(check_request(ScoreConfig(**given), CONSOLE), CONSOLE)


def write_rows(path: Path, ids: Sequence[int], row_group_size: int = 4, **columns: Any) -> None:
    """Rows whose pixels are random and follow from their `id`, and other columns."""
    images = [np.random.default_rng(row).integers(0, 256, 784, np.uint8).tobytes() for row in ids]
    digits = [row % 10 for row in ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": ids, "image": images, "number": digits, "label": digits} | columns)
    # Beside a schema of its own in the metadata Spark sees no other columns.
    table = table.replace_schema_metadata({"org.apache.spark.sql.parquet.row.metadata": "{}"})
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)


class Example:
    """Input of ten rows in three parts, of three rows, of none, and of no Parquet; the output."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self._patch = folder, model, patch
        self.input, self.output = folder / "in", folder / "out"
        self.file = self.input / "a.parquet"
        write_rows(self.file, range(10))
        images = pq.read_table(self.file)["image"].to_pylist()
        images[6] = None
        numbers, labels = [0, 1, 2, 99, *range(4, 10)], [0, 12, None, *range(3, 10)]
        columns: dict[str, Any] = {"image": pa.array(images, pa.binary_view()), "number": numbers}
        write_rows(self.file, range(10), label=labels, **columns, **OTHERS)
        write_rows(self.input / "deep" / "b.pq", range(10, 13))
        write_rows(self.input / "none.parquet", [])
        (self.input / "broken.parquet").write_bytes(b"not Parquet")

    def score(self, execute: Any = score_without_ray, **settings: Any) -> ScoreResult:
        given: dict[str, Any] = {"precision": "fp32", "batch_size": 2, "max_rows_per_file": 4}
        given |= {"model": str(self.model), "output": str(self.output)}
        given |= {"input": str(self.input)} | settings
        return score(self._patch, execute, **given)

    def give_id(self, value: str) -> None:
        """Give the runs that begin from here on this id."""
        self._patch.setattr(record, "secrets", SimpleNamespace(token_hex=lambda _: value))

    def files(self, *but: str) -> dict[str, bytes]:
        """The files in the output, by their names there."""
        found = {}
        for path in self.output.rglob("*"):
            name = str(path.relative_to(self.output))
            if path.is_file() and name not in but:
                found[name] = path.read_bytes()
        return found


@pytest.fixture
def example(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Example:
    """All runs have one id, so that their files can be compared."""
    made = Example(tmp_path, model, monkeypatch)
    made.give_id("id")
    return made
