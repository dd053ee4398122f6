"""A `worker.Scorer` as an actor of Ray Data. This module imports no PyTorch: see `Score`."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from mnistsum_ray.scoring.parts import Part

if TYPE_CHECKING:
    from mnistsum_ray.scoring.counts import RowCounts


@dataclass(frozen=True)
class Report:
    """What an actor says about a task: at its beginning, after each batch of parts, and at its end."""

    task: int = -1
    """Number of the task."""
    begins: Sequence[str] = ()
    """At the beginning the input files of the task."""
    ends: bool = False
    counts: "RowCounts | None" = None
    """Of the parts that were put."""
    started: float = 0.0
    ended: float = 0.0
    """When they were begun and put, in seconds since 1970."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Input files that cannot be used although their footers could be read: name and reason."""
    warning: str | None = None
    failed: str | None = None
    """Why the run cannot go on."""


class Score:
    """Takes tasks, a row each, and gives pickled reports, a row each.

    The model is loaded, and PyTorch imported, by the first task: of a process that dies for want of
    memory the files are known then.
    """

    def __init__(self, request: "ray.ObjectRef[Any]") -> None:
        self._request = request
        self._scorer: Any = None

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        (row,) = task.to_pylist()
        parts = [Part(**part) for part in row["parts"]]

        def pickled(report: Report) -> pa.Table:
            return pa.table({"report": [pickle.dumps(replace(report, task=row["task"]))]})

        yield pickled(Report(begins=sorted({part.name for part in parts})))
        if self._scorer is None:
            from mnistsum_ray.scoring.worker import Scorer

            self._scorer = Scorer(ray.get(self._request), "cuda" if ray.get_gpu_ids() else "cpu")
        yield from map(pickled, self._scorer.score(parts))
