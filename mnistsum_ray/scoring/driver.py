"""Driver of a scoring run: plan, resume, execute, reconcile, publish."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy

from mnistsum_ray.cluster.nodes import check_shared_storage
from mnistsum_ray.cluster.resources import WorkerPlan, WorkerRequest, explain_worker_silence, inspect_cluster, reserve
from mnistsum_ray.cluster.tasks import crash_counter, ray_data_options
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RunError, RunInterrupted, counted, root_cause
from mnistsum_ray.model.cpu import cpu_faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.metrics import JobMetrics
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring.output import (
    OutputFiles,
    all_but,
    check_folders,
    delete_parts,
    follow_output,
    reconcile,
    resume,
    unpublish,
)
from mnistsum_ray.scoring.parts import (
    CPU_TASK_ROWS,
    GPU_TASK_ROWS,
    PART_ROWS,
    WORKER_ROWS,
    make_tasks,
)
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA, Plan, Request, make_plan, say_failures
from mnistsum_ray.scoring.publish import check_strict, publish, result_line, say_result
from mnistsum_ray.storage.lock import folder_lock

_LIKELY_WORKERS: Final = 8


def score(request: Request, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to.

    Raises:
        RequestError: the output folder holds files that this run must not touch.
        TryAgainError: the cluster has too few resources, or another run holds the output folder.
        RunError: the storage does not answer, rows are missing at the end, another run took the output, or with `--strict`
            some input cannot be used.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        return _score(request, console)
    except KeyboardInterrupt:
        raise RunInterrupted("committed files are kept, and the same command resumes") from None
    except (OSError, ray.exceptions.RayError) as error:  # Errors of a single input file never get here: the worker reports them.
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; committed files are kept, and the same command resumes") from error


def _score(request: Request, console: Console) -> ScoreResult:
    started = time.monotonic()
    with folder_lock(request.output, "--output", console.say) as held:
        check_folders(held.place)
        if not request.config.overwrite:
            request = follow_output(request, console)
        resources, precision = _allocate_resources(request.config, console.say)
        first_file = request.inputs.root / request.inputs.files["name"][0].as_py()
        check_shared_storage({"--output": held}, {"--input": first_file}, console.say)
        plan = make_plan(request, precision, held, console)
        say_failures(plan.failures, console.say)
        output, todo = resume(plan, console)

        failures, scoring_seconds = _execute(plan, todo, resources, console)
        say_failures(failures, console.say)
        plan = _drop_failed(plan, failures, console)
        if todo.num_rows or plan.config.overwrite:
            output = OutputFiles.read(plan, console)
        files = reconcile(plan, output.stamps)
        done_before = all_but(output.stamps.filter(output.stamps["planned"]), todo["output"])
        resumed_rows = pc.sum(done_before["rows"]).as_py() or 0
        line = result_line(plan, files, output.counts, resumed_rows, scoring_seconds)
        check_strict(plan, output.counts, line)
        line["seconds"] = round(time.monotonic() - started, 1)
        publish(plan, output, files, line, console)
        say_result(line, output.counts, console.say)
        return ScoreResult.of(line)


def worker_request(config: ScoreConfig) -> WorkerRequest:
    """The pool of workers that a run asks for."""
    workers = (config.num_workers, config.num_workers) if config.num_workers else None
    return WorkerRequest(workers, config.use_gpu, config.wait_seconds)


def _allocate_resources(config: ScoreConfig, say: Callable[[str], None]) -> tuple[WorkerPlan, str]:
    """Reserve workers; return them, and the configured precision or else the faster one of `bf16` and `fp32`."""
    plan = reserve(worker_request(config), say)
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = plan.gpu.bf16 if plan.gpu else cpu_faster_with_bf16()
    return plan, config.precision or ("bf16" if bf16 else "fp32")


def _execute(plan: Plan, todo: pa.Table, resources: WorkerPlan, console: Console) -> tuple[dict[str, str], float]:
    """Score the parts in `todo`.

    Returns:
        Input files that could not be read although their footers could: name and reason. And the seconds from the start of the
        first part to the end of the last one, on the workers' clocks; 0 if there was nothing to score.
    """
    todo_rows = pc.sum(todo["rows"]).as_py() or 0
    resumed_rows = (pc.sum(plan.parts["rows"]).as_py() or 0) - todo_rows
    if not plan.config.num_workers:
        useful = (todo_rows + PART_ROWS * todo.num_rows) // WORKER_ROWS
        resources = replace(resources, worker_range=(1, min(resources.workers, max(1, useful))))
    fitting_workers = inspect_cluster().workers_that_fit(resources.per_worker)
    up_to = "up to " if fitting_workers < resources.workers else ""
    console.say(
        f"{counted(todo_rows, 'row')} to score"
        + (f", {resumed_rows:,} done by an earlier run" if resumed_rows else "")
        + f"; {counted(plan.files.num_rows, 'file')} below {plan.inputs.root.display}"
        + f"; {up_to}{counted(resources.workers, 'GPU worker' if resources.use_gpu else 'CPU worker')}, {plan.precision}"
    )
    if not todo.num_rows:
        return {}, 0.0
    unpublish(plan.held)
    metrics = JobMetrics("score", plan.output.display)
    progress = Progress(console.progress, "rows scored", todo_rows)
    failures: dict[str, str] = {}
    started = float("inf")
    ended = 0.0
    done_rows, rejected_rows = 0, 0
    warned = False
    with console.waiting_for("the workers", explain_worker_silence), crash_counter() as counter:
        pipeline = _make_pipeline(plan, todo, resources, fitting_workers, counter)
        for report in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
            plan.held.check()
            if failed := report["failed"].drop_null().to_pylist():
                raise RunError(f"{failed[0]}; committed files are kept, and the same command resumes")
            for notice in report["notice"].drop_null().to_pylist():
                console.say(notice)
            warnings = report["warning"].drop_null().to_pylist()
            if warnings and not warned:
                console.say(warnings[0])
                warned = True
            for row in report.filter(pc.is_valid(report["unreadable"])).to_pylist():
                failures.setdefault(row["name"], row["unreadable"])
            started = min(started, pc.min(report["started"]).as_py())
            ended = max(ended, pc.max(report["ended"]).as_py())
            rows, rejected = (pc.sum(report[name]).as_py() for name in ("rows", "rejected"))
            done_rows += rows
            rejected_rows += rejected
            progress(rows, ended - started)
            metrics.count(rows=done_rows, rejected_rows=rejected_rows)
            metrics.set(rows_per_second=done_rows / max(ended - started, 1e-9))
    return failures, ended - started


class Score:
    """`worker.Score`, which imports PyTorch. That takes seconds, and only the actors need it."""

    def __init__(self, plan: "ray.ObjectRef[Plan]", crash_counter: Any) -> None:
        from mnistsum_ray.scoring import worker

        self._score = worker.Score(plan, crash_counter)

    def __call__(self, task: pa.Table) -> Iterator[pa.Table]:
        return self._score(task)


def _make_pipeline(plan: Plan, todo: pa.Table, resources: WorkerPlan, fitting_workers: int, counter: Any) -> ray.data.Dataset:
    """Ray Data pipeline: tasks over the parts in `todo` in, `worker.REPORT_SCHEMA` out, in any order."""
    # A cluster may never grow to the workers that are allowed, and a task costs time.
    likely_workers = min(resources.workers, max(_LIKELY_WORKERS, 2 * fitting_workers))
    tasks = make_tasks(todo, GPU_TASK_ROWS if resources.use_gpu else CPU_TASK_ROWS, likely_workers)
    # Workers need no footers and digests, which are large where the files are many.
    inputs = replace(plan.inputs, files=None, skipped={}, unusable={})
    shared = replace(plan, parts=todo.drop_columns(["digest"]), files=FOOTER_SCHEMA.empty_table(), inputs=inputs)
    workers = min(resources.workers, len(tasks))
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=workers,
        initial_size=max(1, min(workers, fitting_workers)),
        max_tasks_in_flight_per_actor=2,  # the one that runs, and the next: no core waits for the driver
    )
    with ray_data_options(preserve_order=False):
        # Not `from_arrow`: tasks of its own, which reserve a CPU each, would look at the tables first.
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            Score,
            fn_constructor_args=(ray.put(shared), counter),
            compute=pool,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.per_worker.get("CPU", 0),
            num_gpus=resources.per_worker.get("GPU", 0),
        )
    dataset.set_name("score-files")
    return dataset


def _drop_failed(plan: Plan, failures: dict[str, str], console: Console) -> Plan:
    """Delete the committed parts of the files that failed during execution; return the plan without them."""
    remaining = plan.without(failures)
    delete_parts(plan.held, all_but(plan.parts, remaining.parts["output"])["output"].to_pylist(), console)
    return remaining
