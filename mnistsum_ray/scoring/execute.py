"""Execution: score the remaining parts on the cluster, with progress on the console."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mnistsum_ray.cluster.resources import explain_worker_silence
from mnistsum_ray.errors import RunError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.metrics import ScoringMetrics
from mnistsum_ray.reporting.progress import Progress, silence_watchdog
from mnistsum_ray.scoring.crash_counter import start_crash_counter
from mnistsum_ray.scoring.pipeline import stream_reports
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.provenance import PredictionSpec
from mnistsum_ray.scoring.resources import ScoringResourcePlan
from mnistsum_ray.scoring.target import Target
from mnistsum_ray.scoring.work_units import make_work_units
from mnistsum_ray.scoring.worker import WorkerContext


@dataclass(frozen=True)
class ExecutionResult:
    """What the workers reported."""

    failures: dict[str, str]
    """Input files that could not be read although their footers could: name and reason."""
    seconds: float
    """From the start of the first part to the end of the last one, on the workers' clocks; 0 if there was nothing to score."""


def execute(
    run: ScoringRun,
    todo: pa.Table,
    spec: PredictionSpec,
    resources: ScoringResourcePlan,
    fitting_workers: int,
    target: Target,
    console: Console,
) -> ExecutionResult:
    """Score the parts in `todo` (`parts.PART_SCHEMA`) and commit them; `fitting_workers` workers fit on the cluster as it is now.

    Raises:
        RunError: a part could not be written, or another run holds the output.
    """
    if not todo.num_rows:
        return ExecutionResult({}, 0.0)
    context = WorkerContext(
        source=run.inputs.root,
        output=target.folder,
        spec=spec,
        weights=ray.put(run.weights),
        batch_size=run.config.batch_size,
        crash_counter=start_crash_counter(),
        fence=target.lock.fence,
        conditional_writes=target.lock.conditional_writes,
    )
    units = make_work_units(todo, run.config.max_rows_per_file, max(resources.workers, resources.readers))
    progress = Progress(console.progress, "rows scored", pc.sum(todo["rows"]).as_py() or 0)
    failures: dict[str, str] = {}
    started, ended, done_rows = float("inf"), 0.0, 0
    metrics = ScoringMetrics(run.output.display)
    with silence_watchdog(console.say, explain_worker_silence) as sign_of_life:
        for report in stream_reports(units, context, resources, fitting_workers):
            sign_of_life()
            target.lock.check()
            unwritable = report["unwritable"].drop_null()
            if len(unwritable):
                reason = unwritable[0].as_py()
                raise RunError(f"--output {run.output.display}: cannot be written: {reason}; committed files are kept")
            for row in report.filter(pc.is_valid(report["unreadable"])).to_pylist():
                failures.setdefault(row["name"], row["unreadable"])
            started = min(started, pc.min(report["started"]).as_py())
            ended = max(ended, pc.max(report["ended"]).as_py())
            rows, rejected = (pc.sum(report[name]).as_py() for name in ("rows", "rejected"))
            done_rows += rows
            progress(rows, ended - started)
            metrics.add(rows, rejected, done_rows / max(ended - started, 1e-9))
    return ExecutionResult(failures, ended - started)
