"""Scoring in this process: the product's driver, planner, store and worker, without a cluster."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring.driver import run
from mnistsum_ray.scoring.parts import Part, make_tasks
from mnistsum_ray.scoring.request import Request, preflight
from mnistsum_ray.scoring.worker import Report, Score

CONSOLE = Console(io.StringIO())


_SCORERS: dict[str, Score] = {}
"""By model: to load one takes longer than to score a few rows."""


def score_here(request: Request, parts: Sequence[Part]) -> Iterator[Report]:
    """Scores parts in tasks of a few, as workers do."""
    if request.config.model not in _SCORERS:
        _SCORERS[request.config.model] = Score(request, "cpu")
    worker = _SCORERS[request.config.model]
    worker._request = request
    for index, task in enumerate(make_tasks(parts, 1, 1)):
        for report in worker.score(task):
            yield replace(report, task=index)


def preflight_of(
    model: Path | str, inputs: Path | str, output: Path | str, **settings: Any
) -> Request:
    given: dict[str, Any] = {"precision": "fp32", "batch_size": 2} | settings
    config = ScoreConfig(model=str(model), input=(str(inputs),), output=str(output), **given)
    return preflight(config, CONSOLE)


def score(
    model: Path | str, inputs: Path | str, output: Path | str, **settings: Any
) -> ScoreResult:
    return run(preflight_of(model, inputs, output, **settings), score_here, CONSOLE)


def write_rows(path: Path, ids: Sequence[int], group: int = 4, bad: int | None = None) -> None:
    """Rows whose pixels are random and follow from their `id`; `bad` has no number in 0..9."""
    images = [np.random.default_rng(row).integers(0, 256, 784, np.uint8).tobytes() for row in ids]
    numbers = [99 if row == bad else row % 10 for row in ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [row % 10 for row in ids]
    table = pa.table({"id": ids, "image": images, "number": numbers, "label": labels})
    pq.write_table(table, path, row_group_size=group)


def files_in(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their names in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
