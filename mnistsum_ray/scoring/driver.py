"""Driver of a scoring run: plan the parts, leave out those that are done, score the rest, count.

input files ──▶ parts, less those that exist ─tasks─▶ Score: read, predict, put ─reports─▶ counts
"""

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import ray.data
import ray.exceptions
import torch
from ray.data import ActorPoolStrategy

from mnistsum_ray.cluster.nodes import check_shared_storage, set_data_options
from mnistsum_ray.cluster.resources import (
    WorkerPlan,
    explain_worker_silence,
    inspect_cluster,
    reserve,
)
from mnistsum_ray.errors import (
    RequestError,
    RowCountError,
    RunError,
    RunInterrupted,
    counted,
    root_cause,
)
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.scoring.actor import Report, Score
from mnistsum_ray.scoring.output import (
    RUN_FILE,
    begin,
    delete_output,
    read_parts,
    read_run,
)
from mnistsum_ray.scoring.parts import (
    CPU_TASK_ROWS,
    GPU_TASK_ROWS,
    PREDICTIONS,
    Part,
    make_tasks,
    split_into_parts,
)
from mnistsum_ray.scoring.publish import Outcome, publish
from mnistsum_ray.scoring.request import Request

_KEPT: Final = "what is scored is kept, and the same command goes on"

_RESTARTS: Final = 10
"""How often Ray starts one worker again that died or lost its node. Retries of a task are not
counted: until Ray knows that a node is gone, it uses them up within a second."""

_NAMED: Final = 1000
"""Most files that cannot be used and get a line."""

Execute = Callable[[Request, Sequence[Part]], Iterator[Report]]
"""Scores parts and reports."""


def score(request: Request, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to.

    Raises:
        RequestError: the output folder holds files that this run must not touch.
        TryAgainError: the cluster has too few resources.
        RunError: the storage does not answer, workers died again and again, rows are missing at the
            end, or with `--strict` some input cannot be used.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        with reserve(request.config, console.say) as plan:
            request = replace(request, precision=_choose_precision(request, plan))
        return run(request, partial(_on_ray, plan, console), console)
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
            nothing = "nothing was deleted, since no file of --input can be used"
            raise RequestError(f"--overwrite: {nothing}")
        delete_output(output, console)
    begin(request)
    for name, reason in itertools.islice(failures.items(), _NAMED):  # files.parquet has all
        console.say(f"cannot be used: {name}: {reason}")
    planned = {part.output: part for part in parts}
    # Before the parts are listed: a manifest that appears later is a second run's, of all parts,
    # and must stay.
    was_finished = (output / MANIFEST).status() is not None
    names, counts, gone = read_parts(request, planned, console)
    if gone:
        files = counted(gone, "output file")
        console.say(f"left as they are: {files} of input that is not there now")
    done = [part for part in parts if part.output in names]
    todo = [part for part in parts if part.output not in names]
    unusable: dict[str, str] = {}
    seconds = 0.0
    if todo:
        if was_finished:
            (output / MANIFEST).delete()
        unusable, seconds = _score(request, todo, counts.rows, execute, console)
        if unusable:
            unused = [part.output for part in parts if part.name in unusable]
            (output / PREDICTIONS).delete_files(unused)
        names, counts, _ = read_parts(request, planned, console)
    # The name of a part says which rows of which file it has, so each row is there exactly once.
    expected = {part.output for part in parts if part.name not in unusable}
    if names != expected:
        wrong = min(names ^ expected)
        problem = "is not" if wrong in expected else "should not be"
        raise RowCountError(f"{PREDICTIONS}/{wrong} {problem} in the output; {_KEPT}")
    resumed_rows = sum(part.rows for part in done if part.name not in unusable)
    outcome = Outcome(request, failures | unusable, counts, gone, resumed_rows, seconds)
    return publish(outcome, started, console)


def _score(
    request: Request, todo: Sequence[Part], resumed_rows: int, execute: Execute, console: Console
) -> tuple[dict[str, str], float]:
    """Score parts.

    Returns:
        Name and reason of input files that could not be read although their footers could; and
        the seconds from the first report of a worker to the last one.
    """
    total = sum(part.rows for part in todo)
    before = f", {resumed_rows:,} done by an earlier run" if resumed_rows else ""
    files = f"{counted(len(request.files), 'file')} below {request.root.display}"
    console.say(f"{counted(total, 'row')} to score{before}; {files}")
    metrics = JobMetrics("score", request.output.display)
    progress = Progress(console.progress, "rows scored", total)
    rows = rejected_rows = 0
    unusable: dict[str, str] = {}
    in_work: dict[int, Sequence[str]] = {}  # files by task
    seconds = 0.0
    started: float | None = None
    try:
        for report in execute(request, todo):
            if started is None:
                started = time.monotonic()
            if report.failed:
                raise RunError(f"{report.failed}; {_KEPT}")
            if report.begins:
                in_work[report.task] = report.begins
            if report.ends:
                in_work.pop(report.task, None)
            for name, reason in report.unusable.items():
                if name not in unusable and len(unusable) < _NAMED:
                    console.say(f"cannot be used: {name}: {reason}")
                unusable[name] = reason
            rows += report.rows
            rejected_rows += report.rejected_rows
            seconds = time.monotonic() - started
            progress(report.rows)
            metrics.count(rows=rows, rejected_rows=rejected_rows)
            metrics.set(rows_per_second=rows / max(seconds, 1e-9))
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:  # an exception, such as for want of CUDA, and no death
            raise
        console.say_lines(str(error))
        names = sorted(set(itertools.chain(*in_work.values())))
        at_work = f"in work were {', '.join(names[:10]) or 'no files yet'}"
        raise RunError(
            f"workers died again and again ({root_cause(error)}); {at_work}; "
            f"give the workers more memory, or take such a file out of --input; {_KEPT}"
        ) from error
    return unusable, seconds


def _choose_precision(request: Request, plan: WorkerPlan) -> str:
    """The precision that is given, else that of the output's run, else the faster one."""
    if request.precision:
        return request.precision
    run_there = None if request.config.overwrite else read_run(request.output)
    if run_there and run_there.get("--precision"):
        return str(run_there["--precision"])
    # Without GPUs, the CPU of this machine stands in for the CPUs of the nodes that score.
    bf16 = plan.gpu.bf16 if plan.gpu else faster_with_bf16(torch.device("cpu"))
    return "bf16" if bf16 else "fp32"


def _on_ray(
    plan: WorkerPlan, console: Console, request: Request, parts: Sequence[Part]
) -> Iterator[Report]:
    """Score parts with actors of Ray Data; their reports come at once, in any order."""
    first_files = {"--output": request.output / RUN_FILE, "--input": request.root / parts[0].name}
    check_shared_storage(first_files, console.say)
    tasks = make_tasks(parts, GPU_TASK_ROWS if plan.use_gpu else CPU_TASK_ROWS, plan.workers)
    rows = [{"task": index, "parts": pickle.dumps(task)} for index, task in enumerate(tasks)]
    most = min(plan.workers, len(tasks))
    at_start = max(1, min(most, inspect_cluster().workers_that_fit(plan.per_worker)))
    more = f", and up to {most} as nodes come" if most > at_start else ""
    kind = "GPU worker" if plan.use_gpu else "CPU worker"
    console.say(f"scoring with {counted(at_start, kind)}{more}, {request.precision}")
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=most,
        initial_size=at_start,
        max_tasks_in_flight_per_actor=2,  # the one that runs, and the next: no core waits
    )
    # Workers need no files but those of their tasks.
    arguments = (replace(request, files=[]), "cuda" if plan.use_gpu else "cpu")
    # Not `from_arrow`: tasks of its own, which reserve a CPU each, would look at the tables first.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    # With small blocks each report comes at once.
    set_data_options(dataset, preserve_order=False, block_bytes=1)
    dataset = dataset.map_batches(
        Score,
        fn_constructor_args=arguments,
        compute=pool,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=plan.per_worker.get("CPU", 0),
        num_gpus=plan.per_worker.get("GPU", 0),
        max_restarts=_RESTARTS,  # by itself Ray Data sets no limit
        max_task_retries=-1,
    )
    dataset.set_name("score-files")
    with console.waiting_for("the workers", explain_worker_silence):
        # Prefetched, a report would wait for the next one, and a task that dies has none.
        reports = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for block in reports:
            yield from map(pickle.loads, block["report"].to_pylist())
