"""Driver of a scoring run: plan, resume, execute, reconcile, publish."""

import time
from typing import Any

import pyarrow.compute as pc
import ray.exceptions

from mnistsum_ray.cluster.resources import inspect_cluster
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.errors import RunError, RunInterrupted, root_cause
from mnistsum_ray.model.quantization import maxima_from_card
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.scoring.checks import check_overwrite, check_strict
from mnistsum_ray.scoring.execute import ExecutionResult, execute
from mnistsum_ray.scoring.manifest import make_manifest
from mnistsum_ray.scoring.output_folder import delete_part, unpublish
from mnistsum_ray.scoring.plan import ScoringPlan, make_plan
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.provenance import PredictionSpec
from mnistsum_ray.scoring.publish import publish_output
from mnistsum_ray.scoring.reconcile import match_outputs, reconcile
from mnistsum_ray.scoring.resources import ScoringResourcePlan, allocate_resources
from mnistsum_ray.scoring.resume import CommittedParts, resume
from mnistsum_ray.scoring.summary import count_failed, name_failures, result_line, summarize
from mnistsum_ray.scoring.target import Target, open_target
from mnistsum_ray.storage.lock import output_lock


def score(run: ScoringRun, console: Console) -> dict[str, Any]:
    """Score on the cluster that this process is connected to.

    Returns:
        The fields of the job's last line (see `api.score`).

    Raises:
        RequestError: the cluster has too few resources, or the output folder holds files that this run must not touch.
        RunError: the output cannot be written, rows are missing at the end, another run took the output, or with `--strict`
            some input cannot be used.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        return _score(run, console)
    except KeyboardInterrupt:
        raise RunInterrupted("committed files are kept, and the same command resumes") from None
    except (OSError, ray.exceptions.RayError) as error:  # Errors of a single input file never get here: the reader reports them.
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; committed files are kept, and the same command resumes") from error


def _score(run: ScoringRun, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    resources, precision = allocate_resources(run.config, console.say)
    first_file = run.inputs.root / run.inputs.files["name"][0].as_py()
    check_shared_storage({"--output": run.output}, {"--input": first_file}, console.say)
    spec = _make_spec(run, precision)
    with output_lock(run.output, "--output", console.say) as lock:
        # The checks above fail at once if the storage does not answer; from here on the run waits for it.
        run = run.with_retries()
        target = open_target(run.config, run.output, lock)
        fitting_workers = inspect_cluster().workers_that_fit(resources.per_worker)

        plan = make_plan(run, console)
        committed = resume(plan, spec.canonical_json(), run.inputs.root, target, console)
        console.say(_describe(run, plan, committed, resources, fitting_workers, precision))
        if committed.todo.num_rows and not target.staged:
            unpublish(run.output)

        result = execute(run, committed.todo, spec, resources, fitting_workers, target, console)
        plan = _drop_failed(plan, result, target, console)

        matched = match_outputs(plan.parts, target.read_committed(console.progress), spec.canonical_json())
        files, totals = reconcile(plan.files, matched)
        if target.overwrite:
            check_overwrite(plan.files, committed.published, run.inputs.root)
        if run.config.strict:
            check_strict(totals, count_failed(files), target)

        resumed_rows = committed.done_rows(plan.parts)
        line = result_line(run, files, totals, resumed_rows, result.seconds, time.monotonic() - started)
        manifest = make_manifest(run, precision, line, totals, committed.unplanned)
        publish_output(target, files, totals, manifest, committed.published)
        summarize(line, totals, console.say)
        return line


def _make_spec(run: ScoringRun, precision: str) -> PredictionSpec:
    int8_maxima = maxima_from_card(run.card) if precision == "int8" else None
    return PredictionSpec(run.card["sha256"], precision, run.columns, run.temperatures, int8_maxima)


def _describe(
    run: ScoringRun,
    plan: ScoringPlan,
    committed: CommittedParts,
    resources: ScoringResourcePlan,
    fitting_workers: int,
    precision: str,
) -> str:
    """The console line before execution: rows, files, workers and precision."""
    todo_rows = pc.sum(committed.todo["rows"]).as_py() or 0
    resumed_rows = committed.done_rows(plan.parts)
    up_to = "up to " if fitting_workers < resources.workers else ""
    return (
        f"{todo_rows:,} rows to score"
        + (f", {resumed_rows:,} done by an earlier run" if resumed_rows else "")
        + f"; {plan.files.num_rows:,} files below {run.inputs.root.display}"
        + f"; {up_to}{resources.workers} {'GPU' if resources.use_gpu else 'CPU'} workers, {precision}"
    )


def _drop_failed(plan: ScoringPlan, result: ExecutionResult, target: Target, console: Console) -> ScoringPlan:
    """Name the files that failed during execution and delete their committed parts; return the plan without them."""
    if not result.failures:
        return plan
    name_failures(result.failures, console.say)
    remaining = plan.without(result.failures)
    for name in sorted({*plan.parts["output"].to_pylist()} - {*remaining.parts["output"].to_pylist()}):
        target.lock.fence.check()
        delete_part(target.folder, name)
    return remaining
