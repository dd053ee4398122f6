"""Driver of a scoring run: plan, resume, execute, reconcile, publish."""

import time
from dataclasses import replace
from typing import Any

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
from mnistsum_ray.model.device import cpu_faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.metrics import JobMetrics
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring.output import OutputFiles, all_but, delete_parts, reconcile, resume
from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, GPU_TASK_ROWS, make_tasks
from mnistsum_ray.scoring.preflight import FOOTER_SCHEMA, Plan, Request, make_plan, say_failures
from mnistsum_ray.scoring.publish import check_strict, publish, result_line, say_result
from mnistsum_ray.storage.lock import folder_lock


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
        resources, precision = _allocate_resources(request.config, console)
        first_file = request.inputs.root / request.inputs.files["name"][0].as_py()
        check_shared_storage({"--output": held}, {"--input": first_file}, console.say)
        plan = make_plan(request, precision, held, console)
        say_failures(plan.failures, console.say)
        output, todo = resume(plan, console)

        failures, scoring_seconds = _execute(plan, todo, resources, console)
        say_failures(failures, console.say)
        parts, plan = plan.parts, plan.without(failures)
        delete_parts(held, all_but(parts, plan.parts["output"])["output"].to_pylist(), console)
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


def _allocate_resources(config: ScoreConfig, console: Console) -> tuple[WorkerPlan, str]:
    """Reserve workers; return them, and the configured precision or else the faster one of `bf16` and `fp32`."""
    workers = (config.num_workers, config.num_workers) if config.num_workers else None
    plan = reserve(WorkerRequest(workers, config.use_gpu, config.wait_seconds), console.say)
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
    done = f", {resumed_rows:,} done by an earlier run" if resumed_rows else ""
    console.say(
        f"{counted(todo_rows, 'row')} to score{done}; {counted(plan.files.num_rows, 'file')} below {plan.inputs.root.display}; "
        f"up to {counted(resources.workers, 'GPU worker' if resources.use_gpu else 'CPU worker')}, {plan.precision}"
    )
    if not todo.num_rows:
        return {}, 0.0
    metrics = JobMetrics("score", plan.output.display)
    progress = Progress(console.progress, "rows scored", todo_rows)
    failures: dict[str, str] = {}
    started = float("inf")
    ended = 0.0
    done_rows, rejected_rows = 0, 0
    warned = False
    with console.waiting_for("the workers", explain_worker_silence), crash_counter() as counter:
        pipeline = _make_pipeline(plan, todo, resources, counter)
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


def _make_pipeline(plan: Plan, todo: pa.Table, resources: WorkerPlan, counter: Any) -> ray.data.Dataset:
    """Ray Data pipeline: tasks over the parts in `todo` in, `worker.REPORT_SCHEMA` out, in any order."""
    from mnistsum_ray.scoring.worker import Score  # imports PyTorch

    tasks = make_tasks(todo, GPU_TASK_ROWS if resources.use_gpu else CPU_TASK_ROWS, resources.workers)
    # Workers need no footers, which are large where the files are many.
    inputs = replace(plan.inputs, files=None, skipped={}, unusable={})
    shared = replace(plan, parts=todo, files=FOOTER_SCHEMA.empty_table(), inputs=inputs)
    workers = min(resources.workers, len(tasks))
    fitting = inspect_cluster().workers_that_fit(resources.per_worker)
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=workers,
        initial_size=max(1, min(workers, fitting)),
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
