"""Driver of a scoring run: plan, resume, execute, reconcile, publish."""

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy

from mnistsum_ray.cluster.data_context import ray_data_options
from mnistsum_ray.cluster.resources import explain_worker_silence, inspect_cluster
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.errors import RunError, RunInterrupted, root_cause
from mnistsum_ray.model.int8 import maxima_from_description
from mnistsum_ray.reporting.console import Console, Progress, silence_watchdog
from mnistsum_ray.reporting.metrics import ScoringMetrics
from mnistsum_ray.scoring.crash_counter import start_crash_counter
from mnistsum_ray.scoring.output import Target, delete_part, list_output, open_target, unpublish
from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, GPU_TASK_ROWS, make_tasks
from mnistsum_ray.scoring.preflight import ScoringPlan, ScoringRun, make_plan, name_failures
from mnistsum_ray.scoring.publish import make_manifest, publish_output
from mnistsum_ray.scoring.reconcile import match_outputs, reconcile
from mnistsum_ray.scoring.resources import ScoringResourcePlan, allocate_resources
from mnistsum_ray.scoring.resume import CommittedParts, check_overwrite, resume
from mnistsum_ray.scoring.stamp import REJECTED, PredictionSpec
from mnistsum_ray.scoring.summary import count_failed, result_line, summarize
from mnistsum_ray.scoring.totals import Totals
from mnistsum_ray.scoring.worker import Scorer, ScoringJob
from mnistsum_ray.storage.lock import folder_lock


def score(run: ScoringRun, console: Console) -> tuple[dict[str, Any], bool]:
    """Score on the cluster that this process is connected to.

    Returns:
        The fields of the job's last line (see `api.score`), and whether this run set rows or files aside that no earlier run
        had set aside.

    Raises:
        RequestError: the cluster has too few resources, or the output folder holds files that this run must not touch.
        RunError: the storage does not answer, rows are missing at the end, another run took the output, or with `--strict`
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


def _score(run: ScoringRun, console: Console) -> tuple[dict[str, Any], bool]:
    started = time.monotonic()
    resources, precision = allocate_resources(run.config, console.say)
    first_file = run.inputs.root / run.inputs.files["name"][0].as_py()
    check_shared_storage({"--output": run.output}, {"--input": first_file}, console.say)
    int8_maxima = maxima_from_description(run.card) if precision == "int8" else None
    spec = PredictionSpec(run.card["sha256"], precision, run.columns, int8_maxima)
    with folder_lock(run.output, "--output", console.say) as lock:
        # The checks above fail at once if the storage does not answer; from here on the run waits for it.
        run = run.with_retries()
        target = open_target(run.config, run.output, lock)
        fitting_workers = inspect_cluster().workers_that_fit(resources.per_worker)

        plan = make_plan(run, console)
        committed = resume(plan, spec.canonical_json(), run.inputs.root, target, console)
        new_failures = _new_failures(plan.failures, committed, console)
        console.say(_describe(run, plan, committed, resources, fitting_workers, precision))
        if committed.todo.num_rows and not target.staged:
            unpublish(run.output)

        failures, scoring_seconds = _execute(run, committed.todo, spec, resources, fitting_workers, target, console)
        plan = _drop_failed(plan, failures, target)
        new_failures |= _new_failures(failures, committed, console)

        matched = match_outputs(plan.parts, target.read_committed(console.progress), spec.canonical_json())
        files, totals = reconcile(plan.files, matched)
        if target.overwrite:
            check_overwrite(plan.files, committed.published, run.inputs.root)
        if run.config.strict:
            _check_strict(totals, count_failed(files), target)

        resumed_rows, rejected_before = committed.resumed(plan.parts)
        new_rejected = totals.rejected_rows - rejected_before
        line = result_line(run, files, totals, resumed_rows, scoring_seconds, time.monotonic() - started)
        manifest = make_manifest(run, precision, line, totals, committed.unplanned)
        publish_output(target, files, totals, manifest, committed.published)
        if line["failed_files"] > len(new_failures):
            console.say(f"{line['failed_files'] - len(new_failures):,} files still cannot be used; files.parquet says why")
        summarize(line, totals, new_rejected, console.say)
        return line, bool(new_rejected or new_failures)


def _new_failures(failures: dict[str, str], committed: CommittedParts, console: Console) -> dict[str, str]:
    """Name the unusable files that no earlier run has named with the same reason, and return them."""
    new = {name: reason for name, reason in failures.items() if committed.failures.get(name) != reason}
    name_failures(new, console.say)
    return new


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
    resumed_rows, _ = committed.resumed(plan.parts)
    up_to = "up to " if fitting_workers < resources.workers else ""
    return (
        f"{todo_rows:,} rows to score"
        + (f", {resumed_rows:,} done by an earlier run" if resumed_rows else "")
        + f"; {plan.files.num_rows:,} files below {run.inputs.root.display}"
        + f"; {up_to}{resources.workers} {'GPU' if resources.use_gpu else 'CPU'} workers, {precision}"
    )


def _execute(
    run: ScoringRun,
    todo: pa.Table,
    spec: PredictionSpec,
    resources: ScoringResourcePlan,
    fitting_workers: int,
    target: Target,
    console: Console,
) -> tuple[dict[str, str], float]:
    """Score the parts in `todo` (`parts.PART_SCHEMA`) and commit them.

    Returns:
        Input files that could not be read although their footers could: name and reason. And the seconds from the start of the
        first part to the end of the last one, on the workers' clocks; 0 if there was nothing to score.

    Raises:
        RunError: the storage failed, or another run holds the output.
    """
    if not todo.num_rows:
        return {}, 0.0
    job = ScoringJob(
        parts=ray.put(todo),
        source=run.inputs.root,
        output=target.folder,
        spec=spec,
        weights=ray.put(run.weights),
        batch_size=run.config.batch_size,
        crash_counter=start_crash_counter(),
        lock=target.lock,
    )
    tasks = make_tasks(todo, GPU_TASK_ROWS if resources.use_gpu else CPU_TASK_ROWS, resources.workers)
    progress = Progress(console.progress, "rows scored", pc.sum(todo["rows"]).as_py() or 0)
    failures: dict[str, str] = {}
    started, ended, done_rows = float("inf"), 0.0, 0
    metrics = ScoringMetrics(run.output.display)
    reports = _make_pipeline(job, tasks, resources, fitting_workers).iter_batches(batch_size=None, batch_format="pyarrow")
    with silence_watchdog(console.say, explain_worker_silence) as sign_of_life:
        for report in reports:
            sign_of_life()
            target.lock.check()
            failed = report["failed"].drop_null()
            if len(failed):
                raise RunError(f"{failed[0].as_py()}; committed files are kept, and the same command resumes")
            for row in report.filter(pc.is_valid(report["unreadable"])).to_pylist():
                failures.setdefault(row["name"], row["unreadable"])
            started = min(started, pc.min(report["started"]).as_py())
            ended = max(ended, pc.max(report["ended"]).as_py())
            rows, rejected = (pc.sum(report[name]).as_py() for name in ("rows", "rejected"))
            done_rows += rows
            progress(rows, ended - started)
            metrics.add(rows, rejected, done_rows / max(ended - started, 1e-9))
    return failures, ended - started


def _make_pipeline(
    job: ScoringJob, tasks: list[dict[str, int]], resources: ScoringResourcePlan, fitting_workers: int
) -> ray.data.Dataset:
    """Ray Data pipeline: tasks in, `worker.REPORT_SCHEMA` out, in any order."""
    workers = min(resources.workers, len(tasks))
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=workers,
        initial_size=max(1, min(workers, fitting_workers)),
        max_tasks_in_flight_per_actor=2,  # the one that runs, and the next: no core waits for the driver
    )
    with ray_data_options(preserve_order=False):
        # Not `from_arrow`: tasks of its own, which reserve a CPU each, would look at the tables first.
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        return dataset.map_batches(
            Scorer,
            fn_constructor_args=(job,),
            compute=pool,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
        )


def _drop_failed(plan: ScoringPlan, failures: dict[str, str], target: Target) -> ScoringPlan:
    """Delete the committed parts of the files that failed during execution; return the plan without them."""
    remaining = plan.without(failures)
    for name in sorted({*plan.parts["output"].to_pylist()} - {*remaining.parts["output"].to_pylist()}) if failures else ():
        target.lock.check()
        delete_part(target.folder, name)
    return remaining


def _check_strict(totals: Totals, failed_files: int, target: Target) -> None:
    """With `--strict`, refuse to publish if a row was rejected or a file failed.

    Raises:
        RunError: names the first rejected row.
    """
    if not failed_files and not totals.rejected_rows:
        return
    text = f"--strict: nothing was published: {totals.rejected_rows:,} rows and {failed_files:,} files cannot be used"
    if not totals.rejected_rows:
        raise RunError(text)
    staged = list_output(target.folder).rejected
    folder = (target.folder if staged else target.output) / REJECTED
    with folder.filesystem.open_input_file((folder / min(staged or list_output(target.output).rejected)).path) as stream:
        row = pq.read_table(stream, columns=["source_file", "source_row", "reason"]).slice(0, 1).to_pylist()[0]
    raise RunError(f"{text}; first: {row['source_file']}, row {row['source_row']}: {row['reason']}; all: {folder.display}")
