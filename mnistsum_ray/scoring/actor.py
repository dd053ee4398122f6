"""A `worker.Scorer` as an actor of Ray Data."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from mnistsum_ray.scoring.parts import Part


class Score:
    """Takes tasks, a row each, and gives pickled `worker.Report`s, a row each.

    The model is loaded, and PyTorch imported, by the first task: Ray counts the processes that die in a task, and
    starts those without end that die before.
    """

    def __init__(self, request: "ray.ObjectRef[Any]") -> None:
        self._request = request
        self._scorer: Any = None

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        from mnistsum_ray.scoring.worker import Report, Scorer

        (row,) = task.to_pylist()
        parts = [Part(**part) for part in row["parts"]]

        def pickled(report: Report) -> pa.Table:
            return pa.table({"report": [pickle.dumps(replace(report, task=row["task"]))]})

        yield pickled(Report(begins=sorted({part.name for part in parts})))
        if self._scorer is None:
            self._scorer = Scorer(ray.get(self._request), "cuda" if ray.get_gpu_ids() else "cpu")
        yield from map(pickled, self._scorer.score(parts))
