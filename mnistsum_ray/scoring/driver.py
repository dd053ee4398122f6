"""Driver of a scoring run: plan the parts, leave out those that are done, score the rest, count, and write the manifest.

input files ──▶ parts, less the names that exist ──tasks──▶ Score: read, predict, put ──reports──▶ counts, manifest
"""

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy

from mnistsum_ray.cluster.nodes import check_shared_storage
from mnistsum_ray.cluster.resources import WorkerPlan, WorkerRequest, explain_worker_silence, inspect_cluster, reserve
from mnistsum_ray.cluster.tasks import ray_data_options
from mnistsum_ray.errors import RequestError, RowCountError, RunError, RunInterrupted, counted, root_cause
from mnistsum_ray.model.device import cpu_faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.metrics import JobMetrics
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.scoring.actor import Report, Score
from mnistsum_ray.scoring.counts import RowCounts
from mnistsum_ray.scoring.output import MANIFEST, RUN_FILE, begin, count_parts, delete_output, read_parts, read_run
from mnistsum_ray.scoring.parts import CPU_TASK_ROWS, GPU_TASK_ROWS, PREDICTIONS, Part, make_tasks, split_into_parts
from mnistsum_ray.scoring.request import Request, say_failures
from mnistsum_ray.scoring.result import Outcome, publish

_KEPT: Final = "what is scored is kept, and the same command goes on"

_RETRIES: Final = 3
"""How often Ray begins a task again in which a worker died."""

_RESTARTS: Final = 20
"""How often Ray starts one worker again: it may die before its first task, and lose its node more than once."""

_NAMED: Final = 10
"""Files in work that a message names."""

Execute = Callable[[Request, Sequence[Part]], Iterator[Report]]
"""Scores parts and reports."""


def score(request: Request, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to.

    Raises:
        RequestError: the output folder holds files that this run must not touch.
        TryAgainError: the cluster has too few resources.
        RunError: the storage does not answer, workers died again and again, rows are missing at the end, or with `--strict`
            some input cannot be used.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        resources, precision = _allocate_resources(request, console)
        return run(replace(request, precision=precision), partial(_on_ray, resources, console), console)
    except KeyboardInterrupt:
        raise RunInterrupted(_KEPT) from None
    except (OSError, ray.exceptions.RayError) as error:
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {_KEPT}") from error


def run(request: Request, execute: Execute, console: Console) -> ScoreResult:
    """Score with workers of any kind; errors are those of `score`."""
    started = time.monotonic()
    output = request.output
    parts, failures = split_into_parts(request.files, request.config.max_rows_per_file)
    if request.config.overwrite:
        if not parts:
            raise RequestError("--overwrite: nothing was deleted, since no file of --input can be used")
        delete_output(output, console)
    begin(request)
    say_failures(failures, console.say)
    planned = {part.output: part for part in parts}
    # Asked before the parts are: a manifest that a second run writes meanwhile is true.
    was_finished = (output / MANIFEST).status() is not None
    found = read_parts(request, planned, console)
    if found.gone:
        console.say(f"left as they are: {counted(found.gone, 'output file')} of input that is not there now")
    done = [part for part in parts if part.output in found.done]
    todo = [part for part in parts if part.output not in found.done]
    scored = _Scored(count_parts(request, done, console))
    if todo:
        if was_finished:
            (output / MANIFEST).delete()
        _score(request, todo, execute, scored, console)
    if scored.unusable:
        say_failures(scored.unusable, console.say)
        failures |= scored.unusable
        (output / PREDICTIONS).delete_files([part.output for part in parts if part.name in failures])
        parts = [part for part in parts if part.name not in failures]
        scored.counts = count_parts(request, parts, console)  # without what was scored of those files
    _check_complete(request, planned, parts, scored.counts.rows, console)
    resumed_rows = sum(part.rows for part in done if part.name not in failures)
    return publish(Outcome(request, failures, scored.counts, resumed_rows, scored.seconds, found.gone), started, console)


def _check_complete(
    request: Request, planned: Mapping[str, Part], parts: Sequence[Part], counted_rows: int, console: Console
) -> None:
    """Check that each of these parts is in the output, and no other planned one, and that their rows were counted.

    The name of a part says which rows of which file it has, so each row is there exactly once.

    RowCountError: there is another part, or other rows.
    """
    try:
        found = read_parts(request, planned, console)
    except RequestError as error:
        raise RowCountError(str(error)) from None
    for name in sorted(found.done ^ {part.output for part in parts}):
        part = planned[name]
        rows = f"{part.name}: its rows {part.first_row:,} to {part.first_row + part.rows - 1:,}"
        problem = "should not be" if name in found.done else "are not"
        raise RowCountError(f"{rows} {problem} in {PREDICTIONS}/{name}; {_KEPT}")
    rows_there = sum(part.rows for part in parts)
    if counted_rows != rows_there:
        raise RowCountError(f"{counted_rows:,} rows were counted, and {rows_there:,} are in the output; {_KEPT}")


@dataclass
class _Scored:
    """What the workers have reported, and before it what earlier runs had scored."""

    counts: RowCounts
    unusable: dict[str, str] = field(default_factory=dict)
    """Input files that could not be read although their footers could: name and reason."""
    seconds: float = 0.0
    """From the start of the first part to the end of the last one, on the workers' clocks."""


def _score(request: Request, todo: Sequence[Part], execute: Execute, scored: _Scored, console: Console) -> None:
    """Score parts, and add the workers' reports to `scored`."""
    resumed_rows = scored.counts.rows
    rows = sum(part.rows for part in todo)
    before = f", {resumed_rows:,} done by an earlier run" if resumed_rows else ""
    console.say(f"{counted(rows, 'row')} to score{before}; {counted(len(request.files), 'file')} below {request.root.display}")
    metrics = JobMetrics("score", request.output.display)
    progress = Progress(console.progress, "rows scored", rows)
    started, ended = float("inf"), 0.0
    in_work: dict[int, Sequence[str]] = {}
    warned = False
    try:
        for report in execute(request, todo):
            if report.failed:
                raise RunError(f"{report.failed}; {_KEPT}")
            if report.begins:
                in_work[report.task] = report.begins
            if report.ends:
                in_work.pop(report.task, None)
            if report.warning and not warned:
                console.say(report.warning)
                warned = True
            scored.unusable |= report.unusable
            if report.counts is None:
                continue
            scored.counts.add(report.counts)
            started, ended = min(started, report.started), max(ended, report.ended)
            scored.seconds = ended - started
            progress(report.counts.rows, scored.seconds)
            new_rows = scored.counts.rows - resumed_rows
            metrics.count(rows=new_rows, rejected_rows=scored.counts.total)
            metrics.set(rows_per_second=new_rows / max(scored.seconds, 1e-9))
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:  # an exception, such as for want of CUDA, and no death
            raise
        console.say_lines(str(error))
        names = sorted(set(itertools.chain.from_iterable(in_work.values())))
        files = f"in work were {', '.join(names[:_NAMED])}" if names else "no file was in work yet"
        raise RunError(
            f"workers died again and again ({root_cause(error)}); {files}; "
            f"give the workers more memory, or take such a file out of --input; {_KEPT}"
        ) from error


def _allocate_resources(request: Request, console: Console) -> tuple[WorkerPlan, str]:
    """Reserve workers; return them, and the precision: as given, else that of the output's run, else the faster one."""
    config = request.config
    workers = (config.num_workers, config.num_workers) if config.num_workers else None
    plan = reserve(WorkerRequest(workers, config.use_gpu, config.wait_seconds), console.say)
    precision = request.precision
    if precision is None and not config.overwrite:
        precision = (read_run(request.output) or {}).get("--precision")
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = plan.gpu.bf16 if plan.gpu else cpu_faster_with_bf16()
    return plan, precision or ("bf16" if bf16 else "fp32")


def _on_ray(resources: WorkerPlan, console: Console, request: Request, parts: Sequence[Part]) -> Iterator[Report]:
    """Score parts with actors of Ray Data, which hold the model; their reports come at once, in any order."""
    check_shared_storage({"--output": request.output / RUN_FILE, "--input": request.root / parts[0].name}, console.say)
    kind = "GPU worker" if resources.use_gpu else "CPU worker"
    console.say(f"scoring with up to {counted(resources.workers, kind)}, {request.precision}")
    tasks = make_tasks(parts, GPU_TASK_ROWS if resources.use_gpu else CPU_TASK_ROWS, resources.workers)
    rows = [{"task": index, "parts": [part._asdict() for part in task]} for index, task in enumerate(tasks)]
    workers = min(resources.workers, len(tasks))
    fitting = inspect_cluster().workers_that_fit(resources.per_worker)
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=workers,
        initial_size=max(1, min(workers, fitting)),
        max_tasks_in_flight_per_actor=2,  # the one that runs, and the next: no core waits for the driver
    )
    # Not `from_arrow`: tasks of its own, which reserve a CPU each, would look at the tables first.
    with ray_data_options(preserve_order=False, block_bytes=1):  # small blocks: each report comes at once
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Score,
            fn_constructor_args=(ray.put(replace(request, files=[])),),  # workers need no files but those of their tasks
            compute=pool,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.per_worker.get("CPU", 0),
            num_gpus=resources.per_worker.get("GPU", 0),
            max_restarts=_RESTARTS,  # by itself Ray Data sets no limit to either
            max_task_retries=_RETRIES,
        )
    dataset.set_name("score-files")
    with console.waiting_for("the workers", explain_worker_silence):
        # Prefetched, a report would wait for the next one, and a task that dies has none.
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(pickle.loads, block["report"].to_pylist())
