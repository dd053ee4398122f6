"""The scoring job, top down.

input files ──▶ parts, less those that are there ──tasks──▶ ScoreParts ──answers──▶ count, publish

Why this is not `read_parquet -> map_batches -> write_parquet`: those promise neither one output row
for each input row in order, nor a file that is whole or not there, nor to go on after a kill.
`jobs/benchmark.py score` measures both: at an earlier commit, on two cores, 5,577 rows/s and 3,420.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

import ray.data
import ray.exceptions
import torch

from mnistsum_ray.cluster import resources
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    RunInterrupted,
    TryAgainError,
    counted,
    root_cause,
)
from mnistsum_ray.model.device import faster_with_bf16
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.results import MANIFEST, ScoreResult
from mnistsum_ray.scoring import output as folder
from mnistsum_ray.scoring.actor import Answer, ScoreParts
from mnistsum_ray.scoring.parts import (
    PREDICTIONS,
    Part,
    PartsThere,
    make_tasks,
    read_parts,
    split_into_parts,
    to_row,
)
from mnistsum_ray.scoring.request import ScoreRequest

_KEPT: Final = "what is scored is kept, and the same command goes on"


def score(request: ScoreRequest, console: Console) -> ScoreResult:
    """Score on the cluster that this process is connected to.

    Raises:
        RequestError: the output folder holds files that this run must not touch; the workers that
            were asked for do not fit.
        TryAgainError: the cluster gives no worker in time, or another run changes the output.
        RunError: the storage does not answer, workers died again and again, nothing at all could be
            scored, or with `--strict` some input cannot be used.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        gpu = resources.find_gpu(request.config.use_gpu, console.say)
        workers = plan_workers(request.config, resources.inspect_cluster(), gpu)
        request = replace(request, precision=_choose_precision(request, workers, gpu))
        return run(request, workers, console)
    except KeyboardInterrupt:
        raise RunInterrupted(_KEPT) from None
    except (OSError, ray.exceptions.RayError) as error:
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {_KEPT}") from error


def score_on_ray(
    request: ScoreRequest, workers: "Workers", tasks: Sequence[Sequence[Part]], console: Console
) -> Iterator[Answer]:
    """Score tasks with actors of Ray Data; their answers come at once, in any order.

    TryAgainError: the cluster does not give a worker within `--wait-seconds`.
    """
    most = min(workers.number, len(tasks))
    free = workers.that_fit(ray.available_resources())
    rows = [to_row(number, task) for number, task in enumerate(tasks)]
    # Not `from_arrow`: tasks of its own, which reserve a CPU each, would look at the tables first.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    options = dataset.context
    options.enable_progress_bars = options.print_on_execution_start = False
    options.target_max_block_size = 1  # with small blocks each answer comes at once
    if not free:
        # For one worker. Ray waits for all that are to start at once: two jobs which begin
        # together, and get half of what they ask for, would wait for each other.
        options.wait_for_min_actors_s = max(request.config.wait_seconds, _START_SECONDS)
    dataset = dataset.map_batches(
        ScoreParts,
        fn_constructor_args=(replace(request, files=[]), "cuda" if workers.use_gpu else "cpu"),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=most,
            initial_size=max(1, min(most, free)),
            max_tasks_in_flight_per_actor=2,  # the one that runs, and the next: no core waits
        ),
        num_cpus=0 if workers.use_gpu else workers.share,
        num_gpus=workers.share if workers.use_gpu else 0,
        max_restarts=_RESTARTS,  # by itself Ray Data sets no limit
        max_task_retries=-1,
    )
    dataset.set_name("score-files")
    # Prefetched, an answer would wait for the next one, and a task that dies has none.
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    silent = "they are being started or replaced, or wait for data"
    with console.waiting_for("the workers", lambda: f"{silent}; {resources.describe_free()}"):
        try:
            for block in blocks:
                for row in block.to_pylist():
                    yield Answer(**row)
            return
        except ray.exceptions.GetTimeoutError:
            pass  # the actor that still waits goes with this error's traceback, in which Ray has it
    gc.collect()
    raise TryAgainError(
        f"a worker needs {workers.share:.2g} {workers.kind}, but after "
        f"{options.wait_for_min_actors_s:.0f} s {resources.describe_free()}: other jobs hold the "
        "rest, or the cluster has not grown, and `ray status` says why; give more --wait-seconds"
    )


_START_SECONDS: Final = 30.0
"""Least wait for a worker: some of it is the start of its process."""

_RESTARTS: Final = 10
"""How often Ray starts one worker again that died or lost its node. Retries of a task are not
counted: until Ray knows that a node is gone, it uses them up within a second."""

_CPU_TASK_ROWS: Final = 32_768
_GPU_TASK_ROWS: Final = 262_144
"""Rows of a task, some seconds of work: a task costs the driver 7 to 9 ms."""


ScoreTasks = Callable[..., Iterator[Answer]]
"""`score_on_ray`, or another way to score tasks: it takes the same and gives the same."""


def run(
    request: ScoreRequest,
    workers: "Workers",
    console: Console,
    score_tasks: ScoreTasks = score_on_ray,
) -> ScoreResult:
    """Score with these workers; errors are as of `score`."""
    started = time.monotonic()
    predictions, manifest = request.output / PREDICTIONS, request.output / MANIFEST
    parts, failures = split_into_parts(request.files, request.config.max_rows_per_file)
    planned = {part.output: part for part in parts}
    if request.config.overwrite:
        if not parts:
            raise RequestError("--overwrite: no file of --input can be used; nothing was deleted")
        folder.delete_output(request.output, console)
    request = replace(request, run_id=folder.begin(request))
    for name, reason in failures.items():
        console.say(f"cannot be used: {name}: {reason}")

    before = there = read_parts(request, planned, console)
    folder.check_may_go_on(request, before)
    todo = [part for part in parts if part.output not in before.done]
    if todo or before.stale:
        manifest.delete()
    if before.stale:
        predictions.delete_files(list(before.stale))
        before.stale.clear()

    scoring_seconds = 0.0
    if todo:
        counts = _score_parts(request, workers, todo, before, console, score_tasks)
        unusable, scoring_seconds = counts
        there = read_parts(request, planned, console, unusable)
        if there.useless:
            predictions.delete_files(there.useless)
        planned = {name: part for name, part in planned.items() if part.input not in unusable}
        failures |= unusable
    folder.check_complete(request, planned, before, there)

    resumed_rows = sum(part.rows for name, part in planned.items() if name in before.done)
    new_rows = there.totals["rows"] - resumed_rows
    figures = {
        "resumed_rows": resumed_rows,
        "rows_per_second": round(new_rows / scoring_seconds, 1) if scoring_seconds else 0.0,
        "seconds": round(time.monotonic() - started, 1),
    }
    return folder.publish(request, failures, there, figures, console)


def _score_parts(
    request: ScoreRequest,
    workers: "Workers",
    todo: Sequence[Part],
    before: PartsThere,
    console: Console,
    score_tasks: ScoreTasks,
) -> tuple[dict[str, str], float]:
    """Score parts.

    Returns:
        Name and reason of input files that could not be read although their footers could; and
        the seconds from the first answer of a worker to the last one.
    """
    total = sum(part.rows for part in todo)
    task_rows = _GPU_TASK_ROWS if workers.use_gpu else _CPU_TASK_ROWS
    tasks = make_tasks(todo, task_rows, workers.number)
    most = counted(min(workers.number, len(tasks)), f"{workers.kind} worker")
    console.say(
        f"{counted(total, 'row')} to score, {before.totals['rows']:,} done by earlier runs; "
        f"{counted(len(request.files), 'file')} below {request.root.display}; "
        f"with up to {most}, {request.precision}"
    )
    metrics = JobMetrics("score", request.output.display)
    progress = Progress(console.progress, "rows scored", total)
    rows = rejected_rows = 0
    unusable: dict[str, str] = {}
    in_work: set[int] = set()
    started = seconds = 0.0
    try:
        for answer in score_tasks(request, workers, tasks, console):
            started = started or time.monotonic()
            seconds = time.monotonic() - started
            if answer.kind == "begins":
                in_work.add(answer.task)
            elif answer.kind == "ends":
                in_work.discard(answer.task)
            elif answer.kind == "failed":
                raise RunError(f"{answer.reason}; {_KEPT}")
            elif answer.kind == "unusable" and answer.file not in unusable:
                console.say(f"cannot be used: {answer.file}: {answer.reason}")
                unusable[answer.file] = answer.reason
            rows += answer.rows
            rejected_rows += answer.rejected_rows
            progress(answer.rows)
            metrics.count(rows=rows, rejected_rows=rejected_rows)
            metrics.set(rows_per_second=rows / max(seconds, 1e-9))
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:  # an exception, such as for want of CUDA, and no death
            raise
        console.say_lines(str(error))
        names = sorted({part.input for task in in_work for part in tasks[task]})
        raise RunError(
            f"workers died again and again ({root_cause(error)}); "
            f"in work were {', '.join(names[:10]) or 'no files yet'}; "
            f"give the workers more memory, or take such a file out of --input; {_KEPT}"
        ) from error
    return unusable, seconds


@dataclass(frozen=True)
class Workers:
    """The actors that score."""

    number: int
    """The most that run at a time."""
    use_gpu: bool = False
    share: float = 1.0
    """Of a CPU, or of a GPU, that each of them reserves. No CPU beside a GPU: Ray Data 2.60 warns
    against both at once, and on a node with few CPUs the GPU would stay unused."""

    @property
    def kind(self) -> str:
        return "GPU" if self.use_gpu else "CPU"

    def that_fit(self, free: Mapping[str, float]) -> int:
        """How many fit on these resources."""
        return int(free.get(self.kind, 0.0) / self.share + 1e-9)  # three thirds are less than 1


_WORKERS_PER_GPU: Final = 4
"""While one decodes and writes, the others compute."""


def plan_workers(
    config: ScoreConfig, cluster: resources.ClusterResources, gpu: resources.Gpu | None
) -> Workers:
    """One worker a CPU, or four a GPU; as many as the cluster has now, or as were asked for.

    RequestError: more were asked for than fit on a cluster that cannot grow.
    """
    each = Workers(1)
    if gpu or config.use_gpu:
        # If fewer were asked for, each gets a larger share: else Ray packs them on the first GPUs.
        gpus = max(1, int(cluster.total("GPU")))
        on_one = ceil((config.num_workers or gpus * _WORKERS_PER_GPU) / gpus)
        each = Workers(1, use_gpu=True, share=1 / min(on_one, _WORKERS_PER_GPU))
    fitting = sum(each.that_fit(node) for node in cluster.nodes)
    number = config.num_workers or max(1, fitting)
    if number > fitting and not cluster.can_grow:
        fit = f"only {fitting} of them fit, with {each.share:.2g} {each.kind} each"
        raise RequestError(f"--num-workers {number}: {fit} ({cluster})")
    return replace(each, number=number)


def _choose_precision(request: ScoreRequest, workers: Workers, gpu: resources.Gpu | None) -> str:
    """The precision that is given, else that of the output's run, else the faster one."""
    begun = None if request.config.overwrite else folder.read_run(request.output)
    chosen = request.precision or (begun and begun["request"].get("--precision"))
    if chosen:
        return str(chosen)
    if workers.use_gpu:  # GPUs that are still to come may be too old for bfloat16
        return "bf16" if gpu and gpu.bf16 else "fp32"
    # The CPU of this machine stands in for those of the nodes that score.
    return "bf16" if faster_with_bf16(torch.device("cpu")) else "fp32"
