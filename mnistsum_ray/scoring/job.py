"""The scoring job, top down.

input files ──▶ parts, less those that are there ──tasks──▶ ScoreParts ──answers──▶ count, publish

Why this is not `read_parquet -> map_batches -> write_parquet`: those promise neither one output row
for each input row in order, nor a file that is whole or not there. `jobs/benchmark.py score`
measures the speed of both (README).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Final

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
from mnistsum_ray.scoring import output
from mnistsum_ray.scoring.actor import Answer, ScoreParts
from mnistsum_ray.scoring.parts import (
    MIB,
    PREDICTIONS,
    Footers,
    FoundParts,
    Part,
    make_tasks,
    read_parts,
    split_into_parts,
)
from mnistsum_ray.scoring.request import ScoreRequest
from mnistsum_ray.storage.uri import as_request_error

_SILENT_SECONDS: Final = 7200.0
"""Longest wait for an answer: two million rows, the most of a part, take a slow CPU an hour."""


def score(request: ScoreRequest, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to; errors are those of `api.score`."""
    try:
        gpu_precision = resources.precision_of_gpu(request.config.use_gpu, console.say)
        cluster = resources.inspect_cluster()
        plan = plan_workers(request.config, cluster, has_gpu=gpu_precision is not None)
        precision = _choose_precision(request, plan, gpu_precision)
        config = request.config.model_copy(update={"precision": precision})
        return _score(replace(request, config=config), plan, console)
    except KeyboardInterrupt:
        raise RunInterrupted(_how_to_go_on(request.config)) from None
    except (OSError, ray.exceptions.RayError) as error:
        cause = getattr(error, "cause", error)  # what an actor raised, with Ray's advice below it
        if isinstance(cause, StorageError):
            raise ended_by_storage(cause, _how_to_go_on(request.config)) from error
        if isinstance(cause, RunError):
            raise RunError(str(cause).partition("\n")[0]) from error
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {_how_to_go_on(request.config)}") from error


def _how_to_go_on(config: ScoreConfig) -> str:
    again = "the same command without --overwrite" if config.overwrite else "the same command"
    return f"what is scored is kept, and {again} goes on"


def _score(request: ScoreRequest, plan: WorkerPlan, console: Console) -> ScoreResult:
    started = time.monotonic()
    predictions = request.output / PREDICTIONS
    planned = split_into_parts(request)
    if request.config.overwrite:
        if not planned:
            raise RequestError("--overwrite: no file of --input can be used; nothing was deleted")
        output.delete_output(request.output, console)
    with as_request_error("--output"):
        request = replace(request, run_id=output.begin(request, console))
    failures = {file.name: file.error for file in request.files if file.error}
    for name, reason in failures.items():
        console.say(f"cannot be used: {name}: {reason}")

    footers: Footers = {}  # read once a run
    before = read_parts(request, planned, footers, console)
    output.say_what_goes_on(planned, before, console)
    todo = [part for name, part in planned.items() if name not in before.done]
    after, scoring_seconds = before, 0.0  # if nothing is to be done
    if todo or before.stale:
        (request.output / MANIFEST).delete()
        predictions.delete_files(list(before.stale))
        if todo:
            unusable, scoring_seconds = _score_parts(request, plan, todo, console)
            failures |= unusable
            if unusable:
                # Its parts that are `done`, so as planned, are deleted. Those of another version of
                # the file stay: a later run has put them, and `check_complete` ends this one.
                useless = {name for name, part in planned.items() if part.input in unusable}
                done = _read_again(request, planned, footers, console).done
                predictions.delete_files(list(useless & done))
                for name in useless:
                    del planned[name]
        after = _read_again(request, planned, footers, console)
    output.check_complete(request, planned.keys(), before, after)

    resumed_rows = sum(part.rows for name, part in planned.items() if name in before.done)
    new_rows = after.counts.get("rows", 0) - resumed_rows
    run_figures: dict[str, Any] = {
        "resumed_rows": resumed_rows,
        "rows_per_second": round(new_rows / scoring_seconds, 1) if scoring_seconds else 0.0,
        "seconds": round(time.monotonic() - started, 1),
    }
    return output.publish(request, failures, after, run_figures, console)


def _read_again(
    request: ScoreRequest, planned: Mapping[str, Part], footers: Footers, console: Console
) -> FoundParts:
    """The parts after the scoring. TryAgainError: they are no longer of this run alone."""
    try:
        return read_parts(request, planned, footers, console)
    except RequestError as error:  # whose advice, --overwrite, would delete another run's parts
        problem, advice = str(error).partition(";")[0], "wait for other runs, and run it again"
        raise TryAgainError(f"{problem}, which it was not before; {advice}") from None


def _score_parts(
    request: ScoreRequest, plan: WorkerPlan, todo: Sequence[Part], console: Console
) -> tuple[dict[str, str], float]:
    """Score parts.

    Returns: why input files could not be read although their footers could, by their names; and the
    seconds from the first answer of a worker to the last one.
    """
    total, known = sum(part.rows for part in todo), sum(file.rows or 0 for file in request.files)
    # Some seconds of work: a task costs the driver 7 to 9 ms.
    tasks = make_tasks(request, todo, (256 if plan.use_gpu else 32) * MIB, plan.most)
    plan = replace(plan, most=min(plan.most, len(tasks)))
    console.say(
        f"{total:,} of {counted(known, 'row')} to score; "
        f"{counted(len(request.files), 'file')} below {request.root.display}; "
        f"with {plan}, {request.config.precision}"
    )
    metrics = JobMetrics("score", request.output.display)
    progress = Progress(console.progress, "rows scored", total)
    rows = rejected_rows = 0
    unusable: dict[str, str] = {}
    open_tasks: set[int] = set()
    started = seconds = 0.0
    try:
        for answer in score_on_ray(request, plan, tasks, console):
            started = started or time.monotonic()
            seconds = time.monotonic() - started
            open_tasks.add(answer.task)
            if answer.ends:
                open_tasks.remove(answer.task)
            if answer.file and answer.file not in unusable:
                console.say(f"cannot be used: {answer.file}: {answer.reason}")
                unusable[answer.file] = answer.reason
            rows += answer.rows
            rejected_rows += answer.rejected_rows
            progress(answer.rows)
            metrics.count(rows=rows, rejected_rows=rejected_rows)
            metrics.set(rows_per_second=rows / max(seconds, 1e-9))
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:  # it raised, such as for want of CUDA, and did not die
            raise
        console.say_lines(str(error))
        names = sorted({part.input for task in open_tasks for part in tasks[task]})
        raise RunError(
            f"workers died again and again ({root_cause(error)}); "
            f"in work were {', '.join(names[:10]) or 'no files yet'}; "
            "give the workers more memory, or take such a file out of --input; "
            f"{_how_to_go_on(request.config)}"
        ) from error
    return unusable, seconds


def score_on_ray(
    request: ScoreRequest, plan: WorkerPlan, tasks: Sequence[Sequence[Part]], console: Console
) -> Iterator[Answer]:
    """Score tasks with actors of Ray Data; their answers come at once, in any order.

    TryAgainError: the cluster does not give a worker within `--wait-seconds`, or no worker answers.
    """
    if not started_cluster():
        wait_seconds = request.config.wait_seconds
        resources.wait_for(plan.per_worker, "the first worker", wait_seconds, console.say)
    # Ray says how much is free, but not on which nodes: take all for one node.
    free = ClusterResources((ray.available_resources(),)).workers_that_fit(plan.per_worker)
    rows = []
    for number, task in enumerate(tasks):
        rows.append({"task": number, "parts": [part._asdict() for part in task]})
    # Not `from_arrow`: its tasks, which reserve a CPU each, would look at the tables first.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    options = dataset.context
    options.enable_progress_bars = options.print_on_execution_start = False
    options.raise_original_map_exception = True  # `score` looks at its type
    options.target_max_block_size = 1  # with small blocks each answer comes at once
    options.execution_no_progress_timeout_s = _SILENT_SECONDS
    dataset = dataset.map_batches(
        ScoreParts,
        fn_constructor_args=(replace(request, files=[]), "cuda" if plan.use_gpu else "cpu"),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=plan.most,
            initial_size=max(1, min(plan.most, free)),
            # The one that runs, and the next: no core waits. Few tasks may be long: the first actor
            # that is there would take one that another actor could begin.
            max_tasks_in_flight_per_actor=2 if len(tasks) > 4 * plan.most else 1,
        ),
        num_cpus=plan.per_worker.get("CPU", 0),
        num_gpus=plan.per_worker.get("GPU", 0),
        # Ray Data limits neither restarts nor retries. A worker that dies at each start must end
        # the job, and so must a task that kills each worker. (This process cannot count its begins:
        # Ray gives each answer of a repeated task once.) A task uses up any number of retries in
        # the second before Ray knows that its node is gone. Ray prints that arguments of a
        # restarted actor may be lost: this process owns them until the end.
        max_restarts=10,
        max_task_retries=-1,
    )
    dataset.set_name("score-files")
    # No prefetch: each answer would wait for the one after it, which a task that dies never gives.
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    silent = "they are being started or replaced, or wait for data"
    with console.waiting_for("the workers", lambda: f"{silent}; {resources.describe_free()}"):
        try:
            for block in blocks:
                for row in block.to_pylist():
                    yield Answer(**row)
            return
        except ray.data.exceptions.ExecutionTimeoutError as error:
            raise TryAgainError(resources.shortage(plan.needed, _SILENT_SECONDS)) from error


def plan_workers(config: ScoreConfig, cluster: ClusterResources, *, has_gpu: bool) -> WorkerPlan:
    """One worker a CPU, or four a GPU; as many as the cluster has now, or as were asked for.

    RequestError: more were asked for than fit on a cluster that cannot grow.
    """
    each = {"CPU": 1.0}
    if has_gpu or config.use_gpu:
        # Four a GPU: while one decodes and writes, the others compute. Fewer workers get larger
        # shares: Ray packs small ones on the first GPUs. And no CPU: Ray Data warns against asking
        # for both, and on a node with few CPUs the GPU would stay unused.
        gpus = max(1, int(cluster.total("GPU")))
        each = {"GPU": 1 / min(4, ceil((config.num_workers or 4 * gpus) / gpus))}
    fitting = cluster.workers_that_fit(each)
    most = config.num_workers or max(1, fitting)
    plan = WorkerPlan(least=1, most=most, per_worker=each, threads=None)
    if plan.most > fitting and not cluster.can_grow:
        fit = f"only {fitting} of them fit, with {plan.needed} each"
        raise RequestError(f"--num-workers {plan.most}: {fit} ({cluster})")
    return plan


def _choose_precision(request: ScoreRequest, plan: WorkerPlan, gpu_precision: str | None) -> str:
    """The given precision, else that of the output's run, else the model's or the faster one."""
    if not request.task.bf16:
        return "fp32"
    trained_in = request.description.get("precision")  # not known of a model of `save_model`
    begun = {} if request.config.overwrite else output.read_run(request.output)
    if plan.use_gpu:
        faster = gpu_precision or "fp32"  # GPUs that are still to come may be too old for bfloat16
    else:  # the CPU of this machine stands in for those of the nodes that score
        faster = "bf16" if faster_with_bf16(torch.device("cpu")) else "fp32"
    if trained_in == "fp32":  # a training in full was asked for, or had no bfloat16
        faster = "fp32"
    return request.config.precision or begun.get("--precision") or faster
