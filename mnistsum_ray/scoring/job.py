"""The scoring job, top down: plan, score, settle, publish.

input files ──▶ parts that do not exist yet ──tasks──▶ ScoreParts ──answers──▶ settle, publish

Why this is not `read_parquet -> map_batches -> write_parquet`: those promise neither one output row
for each input row in order, nor a file that is whole or not there. `jobs/benchmark.py score`
measures the speed of both (README).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from typing import Final

import ray.data
import ray.data.exceptions
import ray.exceptions
import torch

from mnistsum_ray.cluster import resources
from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    RunInterrupted,
    StorageError,
    TryAgainError,
    counted,
    ended_by_storage,
    root_cause,
)
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.scoring import record
from mnistsum_ray.scoring.actor import Answer, ScoreParts
from mnistsum_ray.scoring.parts import (
    PREDICTIONS,
    START_OVER,
    Part,
    Run,
    make_tasks,
    refusal,
    split_into_parts,
)
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.uri import as_request_error

_SILENT_SECONDS: Final = 7200.0
"""Longest wait for an answer: two million rows, the most of a part, take a slow CPU an hour."""

_ERRORS_OF_RAY: Final = (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError)


def score(request: ScoreRequest, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to; errors are those of `api.score`."""
    started = time.monotonic()
    run = Run(request)
    try:
        use_gpu = resources.has_usable_gpu(request.config.use_gpu, console.say)
        workers = plan_workers(request.config, resources.inspect_cluster(), use_gpu=use_gpu)
        precision = choose_precision(request, console, use_gpu=use_gpu)
        config = request.config.model_copy(update={"precision": precision})
        run.request = replace(request, config=config)
        plan(run, console)
        metrics = JobMetrics("score", request.output.display)
        score_missing(run, workers, metrics, console)
        settle(run, console)
        metrics.set(rejected_files=len(run.rejected_files))
        result = record.publish(run, time.monotonic() - started, console)
        metrics.set(last_success_seconds=time.time())
        return result
    except (KeyboardInterrupt, OSError, *_ERRORS_OF_RAY) as error:
        raise explain_end(error, run, console) from error


def explain_end(error: BaseException, run: Run, console: Console) -> BaseException:
    """Return why a run has ended, in one line that says how to resume."""
    again = "the same command" + (" without --overwrite" if run.request.config.overwrite else "")
    how_to_resume = f"what is scored is kept, and {again} continues"
    if isinstance(error, KeyboardInterrupt):
        return RunInterrupted(how_to_resume)
    cause = getattr(error, "cause", error)  # what an actor raised, with Ray's advice below it
    if isinstance(cause, StorageError):
        return ended_by_storage(cause, how_to_resume)
    if isinstance(cause, RunError):
        return RunError(str(cause).partition("\n")[0])
    if isinstance(error, ray.data.exceptions.ExecutionTimeoutError):
        free = resources.describe_free()
        problem = f"no worker has answered for {_SILENT_SECONDS:.0f} s; only {free}"
        return TryAgainError(f"{problem}; {how_to_resume}")
    console.say_lines(str(error))
    problem = root_cause(error)
    is_death = isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError)
    # An actor that raises at its start, such as for want of CUDA, has not died.
    if is_death and not getattr(error, "actor_init_failed", False):
        names = sorted({part.input for parts in run.in_work.values() for part in parts})
        problem = f"workers died again and again ({problem}); in work were "
        problem += f"{', '.join(names[:10]) or 'no files yet'}; give the workers more memory, "
        problem += "or take such a file out of --input"
    return RunError(f"{problem}; {how_to_resume}")


def plan(run: Run, console: Console) -> None:
    """Begin or resume a run: which parts it needs, and which exist.

    RequestError: the output is of another request.
    """
    request = run.request
    run.planned = split_into_parts(request)
    if request.config.overwrite:
        if not run.planned:
            raise RequestError("--overwrite: no file of --input can be used; nothing was deleted")
        record.delete_output(request.output, console)
    with as_request_error("--output"):
        run.request = replace(request, run_id=record.begin(request))
    for file in request.files:
        if file.error:
            reject_file(run, file.name, file.error, console)
    run.read(console)
    for name, stored in run.stored.items():
        if stored.run != run.request.run_id:
            problem = f"{PREDICTIONS}/{name} is of another run than {record.RUN_FILE}"
            raise refusal(request.output, f"{problem}; {START_OVER}")
    run.resumed = frozenset(run.done)
    say_what_goes_on(run, console)


def reject_file(run: Run, name: str, reason: str, console: Console) -> None:
    """Note that a file of the input cannot be scored, and say so once."""
    if name not in run.rejected_files:
        console.say(f"rejected: {name}: {reason}")
        run.rejected_files[name] = reason


def say_what_goes_on(run: Run, console: Console) -> None:
    """Say how many files of the input are new, have changed or are gone, if there is output."""
    begun = {stored.part.input for stored in run.stored.values()}
    if not begun:
        return
    new = {part.input for part in run.planned.values()} - begun
    changed = {stored.part.input for stored in run.stale.values()}
    gone = {stored.part.input for stored in run.gone.values()}
    kinds = {"new": new, "changed, and scored again": changed, "gone; their output stays": gone}
    for kind, files in kinds.items():
        if files:
            console.say(f"{counted(len(files), 'file')} of the input: {kind}")


def score_missing(run: Run, workers: WorkerPlan, metrics: JobMetrics, console: Console) -> None:
    """Score the parts that are missing, and delete those of files that have changed."""
    request = run.request
    todo = [part for name, part in run.planned.items() if name not in run.done]
    if todo or run.stale:
        (request.output / MANIFEST).delete()
        (request.output / PREDICTIONS).delete_files(list(run.stale))
    total, known = sum(part.rows for part in todo), sum(file.rows or 0 for file in request.files)
    done_rows = sum(part.rows for part in run.done.values())
    rejected_rows = sum(part.rejected_rows for part in run.done.values())
    metrics.count(rows=done_rows, rejected_rows=rejected_rows)
    planned_rows = done_rows + total
    metrics.set(planned_rows=planned_rows)
    if not todo:
        return
    tasks = make_tasks(request, todo, workers.most)
    workers = replace(workers, most=min(workers.most, len(tasks)))
    console.say(
        f"{total:,} of {counted(known, 'row')} to score; "
        f"{counted(len(request.files), 'file')} below {request.root.display}; "
        f"with {workers}, {request.config.precision}"
    )
    progress = Progress(console.progress, "rows scored", total)
    rows = 0
    started = 0.0
    for answer in score_on_ray(request, workers, tasks, console):
        started = started or time.monotonic()
        run.in_work[answer.task] = tasks[answer.task]
        if answer.ends:
            del run.in_work[answer.task]
        if answer.file:
            reject_file(run, answer.file, answer.reason, console)
        rows += answer.rows
        rejected_rows += answer.rejected_rows
        progress(answer.rows)
        metrics.count(rows=done_rows + rows, rejected_rows=rejected_rows)
        run.rows_per_second = rows / max(time.monotonic() - started, 1e-9)
        metrics.set(rows_per_second=run.rows_per_second, planned_rows=planned_rows)


def score_on_ray(
    request: ScoreRequest, workers: WorkerPlan, tasks: Sequence[Sequence[Part]], console: Console
) -> Iterator[Answer]:
    """Score tasks with actors of Ray Data; their answers come at once, in any order.

    TryAgainError: the cluster does not give a worker within `--wait-seconds`.
    """
    if not started_cluster():
        wait_seconds = request.config.wait_seconds
        resources.wait_for(workers.per_worker, "the first worker", wait_seconds, console.say)
    # Ray says how much is free, but not on which nodes: take all for one node.
    free = ClusterResources((ray.available_resources(),)).workers_that_fit(workers.per_worker)
    rows = []
    for number, task in enumerate(tasks):
        rows.append({"task": number, "parts": [part._asdict() for part in task]})
    # Not `from_arrow`: its tasks, which reserve a CPU each, would look at the tables first.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    options = dataset.context
    options.enable_progress_bars = options.print_on_execution_start = False
    options.raise_original_map_exception = True  # `explain_end` looks at its type
    options.target_max_block_size = 1  # with small blocks each answer comes at once
    options.execution_no_progress_timeout_s = _SILENT_SECONDS
    dataset = dataset.map_batches(
        ScoreParts,
        fn_constructor_args=(replace(request, files=[]), "cuda" if workers.use_gpu else "cpu"),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers.most,
            initial_size=max(1, min(workers.most, free)),
            # The one that runs, and the next: no core waits. Few tasks may be long: the first actor
            # that is there would take one that another actor could begin.
            max_tasks_in_flight_per_actor=2 if len(tasks) > 4 * workers.most else 1,
        ),
        num_cpus=workers.per_worker.get("CPU", 0),
        num_gpus=workers.per_worker.get("GPU", 0),
        # Ray Data limits neither restarts nor retries. A worker that dies at each start must end
        # the job, and so must a task that kills each worker. (This process cannot count its begins:
        # Ray gives each answer of a repeated task once.) A task uses up any number of retries in
        # the second before Ray knows that its node is lost. Ray prints that arguments of a
        # restarted actor may be lost: this process owns them until the end.
        max_restarts=10,
        max_task_retries=-1,
    )
    dataset.set_name("score-files")
    # No prefetch: each answer would wait for the one after it, which a task that dies never gives.
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    silent = "they are being started or replaced, or wait for data"
    with console.waiting_for("the workers", lambda: f"{silent}; {resources.describe_free()}"):
        for block in blocks:
            for row in block.to_pylist():
                yield Answer(**row)


def settle(run: Run, console: Console) -> None:
    """Delete the parts of files that were rejected meanwhile; then all others must be there.

    A part's name says which rows of which file it has, so each row occurs once.

    TryAgainError: parts are missing, or others exist, so another run may be at work.
    """
    output, gone_before = run.request.output, run.gone.keys()
    run.read(console)
    # Those that are `done`, so as planned. Those of another version of the file were put by a later
    # run, and stay.
    useless = [name for name, part in run.done.items() if part.part.input in run.rejected_files]
    (output / PREDICTIONS).delete_files(useless)
    for name in useless:
        del run.done[name]
    for name, part in list(run.planned.items()):
        if part.input in run.rejected_files:
            del run.planned[name]
    missing = run.planned.keys() - run.done.keys()
    strange = run.stale.keys() | (run.gone.keys() - gone_before)
    wrong = [f"{PREDICTIONS}/{name}" for name in sorted(missing | strange)]
    record.check_is_own(run.request)
    if wrong:
        raise record.other_run(output, wrong[0])


def plan_workers(config: ScoreConfig, cluster: ClusterResources, *, use_gpu: bool) -> WorkerPlan:
    """Return the number of workers: one per CPU or four per GPU of now, up to --num-workers."""
    each = {"CPU": 1.0}
    if use_gpu:
        # Four a GPU: while one decodes and writes, the others compute. Fewer workers get larger
        # shares: Ray packs small ones on the first GPUs. And no CPU: Ray Data warns against asking
        # for both, and on a node with few CPUs the GPU would stay unused.
        gpus = max(1, int(cluster.total("GPU")))
        each = {"GPU": 1 / min(4, ceil((config.num_workers or 4 * gpus) / gpus))}
    most = config.num_workers or max(1, cluster.workers_that_fit(each))
    return WorkerPlan(least=1, most=most, per_worker=each, threads=None)


def choose_precision(request: ScoreRequest, console: Console, *, use_gpu: bool) -> str:
    """Return `--precision`, else that of the model; fp32 on CPUs without fast bfloat16."""
    asked = request.config.precision
    of_model: str = request.description.get("precision", "fp32")  # `save_model` knows none
    # The CPU of this machine stands in for those of the nodes that score.
    is_fast = use_gpu or faster_with_bf16(torch.device("cpu"))
    precision = asked or (of_model if is_fast else "fp32")
    if precision != of_model:
        why = "--precision" if asked else "these CPUs have no fast bfloat16"
        console.say(f"scoring in {precision} ({why}); the model was trained in {of_model}")
    return precision
