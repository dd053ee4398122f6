"""The training job: read the rows with Ray Data, train with a Ray Train TorchTrainer, publish.

    read_rows ─▶ TorchTrainer(train_loop_per_worker, datasets, EveryRow).fit() ─▶ publish

Ray owns failures and waiting: `FailureConfig` starts workers again that are lost, from the last
checkpoint, and its timeout of the start ends a run that cannot get them. `run_trainer` begins again
where Ray Train does not (see failures.py): a worker has died at its start, the storage has not
taken Ray Train's list of checkpoints, or the last checkpoint is damaged.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.resources import (
    WorkerPlan,
    plan_training,
    wait_for,
)
from mnistsum_ray.cluster.workarounds import default_environment
from mnistsum_ray.data.inputs import report_skipped
from mnistsum_ray.data.sources import check_unchanged
from mnistsum_ray.errors import (
    RequestError,
    RowCountError,
    RunInterrupted,
    counted,
    root_cause,
)
from mnistsum_ray.model.finished import FinishedModel
from mnistsum_ray.model.folder import WEIGHTS_FILE, load_model
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.report import versions
from mnistsum_ray.reporting.results import TrainResult
from mnistsum_ray.storage.bucket import arrow_uri
from mnistsum_ray.storage.uri import folder_lock, locate
from mnistsum_ray.task_loader import code_of
from mnistsum_ray.training.checkpoint import CHECKPOINTS, newest_checkpoint
from mnistsum_ray.training.failures import (
    ctrl_c_as_before,
    errors_in_one_line,
    explain_end,
    is_worth_a_try,
)
from mnistsum_ray.training.loop import LoopConfig, Start, train_loop_per_worker
from mnistsum_ray.training.progress import EventFollower, FailureLines, explain_silence
from mnistsum_ray.training.rows import EveryRow, Rows, fits_in_store, read_rows
from mnistsum_ray.training.run import RunRecord, TrainRequest, check_storage

_LEAST_WAIT_SECONDS: Final = 10.0
"""Least wait for workers: Ray needs a moment for them also where all is free."""

Callbacks = Sequence[ray.train.UserCallback]


def make_trainer(
    request: TrainRequest, plan: WorkerPlan, rows: Rows, loop: LoopConfig, callbacks: Callbacks
) -> TorchTrainer:
    """What Ray Train runs: the loop of each worker, the Datasets and how ranks share them."""
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"loop": loop},
        datasets=rows.datasets,
        dataset_config=EveryRow(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker=plan.per_worker,
            # GPUs exchange gradients fastest within a node; CPU workers use all cores of theirs.
            placement_strategy="PACK" if plan.use_gpu else "SPREAD",
            # How often an elastic run looks for more workers; it grows from its checkpoint.
            elastic_resize_monitor_interval_s=30.0,
        ),
        run_config=ray.train.RunConfig(
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",  # of this attempt
            storage_path=arrow_uri(request.folder / CHECKPOINTS),
            callbacks=[*callbacks, FailureLines(loop.queue, request.folder)],
            # Ray would set this to the CPUs of the worker. Then the threads that feed the steps
            # would have pools of their own, which spin and cost a fifth of the speed. On CPUs the
            # loop sets the threads of the steps; on GPUs they need one.
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            failure_config=ray.train.FailureConfig(
                max_failures=request.config.max_failures,
                max_preemption_failures=-1,
                # No second try of a start that has timed out: the timeout is `--wait-seconds`.
                # An elastic run is tried again without end.
                controller_failure_limit=-1 if plan.is_elastic else 0,
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def train(request: TrainRequest, console: Console, callbacks: Callbacks = ()) -> TrainResult:
    """Train on the cluster that this process is connected to; errors are those of `api.fit`."""
    started = time.monotonic()
    config, parameters = request.config, request.hyperparameters
    how_to_begin = "nothing was begun; the same command tries again"
    with folder_lock(request.folder, "--name"):
        with errors_in_one_line(console, how_to_begin):
            stored = request.stored
            has_model = (request.folder / "model" / WEIGHTS_FILE).exists()
            if stored.get("status") == "finished" and has_model:  # else it is made again
                console.say("the run is finished")
                return TrainResult(**stored["metrics"])
            start = find_start(request, console)
            # The tasks that read rows need a CPU, and a plan needs to see a node.
            wait_for({"CPU": 1}, "the tasks that read rows", config.wait_seconds, console.say)
            is_kept = config.cache is True or (
                config.cache == "auto" and fits_in_store(request.source, request.task)
            )
            plan = plan_training(config, parameters.batch_size, console.say, is_kept=is_kept)
            say_what_differs(stored, plan, console.say)
            rows = read(request, plan, console, is_kept=is_kept)
            record = RunRecord(request, plan, start.history)
            record.begin(rows, start.init_from)
        with errors_in_one_line(console, request.how_to_resume):
            try:
                finished = run_trainer(request, plan, rows, start, record, console, callbacks)
                return record.publish(finished, time.monotonic() - started, console.say)
            except KeyboardInterrupt:
                record.write_status("stopped")
                raise RunInterrupted(request.how_to_resume) from None
            except BaseException:
                record.write_status("failed")
                raise


def say_what_differs(stored: dict[str, Any], plan: WorkerPlan, say: Callable[[str], None]) -> None:
    """Say what decides the bits of a run that goes on, and is not what it was."""
    if not stored:
        return
    had, has, threads = stored.get("versions", {}), versions(), stored.get("threads")
    keep = f" (as many workers, with --use-gpu false --threads {threads}, keep them)"
    pairs = [(f"{name} {had.get(name)}", f"{name} {has[name]}", "") for name in ("torch", "ray")]
    pairs.append((stored.get("workers", ""), str(plan), keep if threads else ""))
    for before, now, advice in pairs:
        if before != now:
            line = f"the run had {before}, and goes on with {now}: its last bits may differ"
            say(line + advice)


def read(request: TrainRequest, plan: WorkerPlan, console: Console, *, is_kept: bool) -> Rows:
    """Read and count the rows, and say which there are, and which are left out.

    RequestError: a run that goes on had others.
    """
    source, config, say = request.source, request.config, console.say
    report_skipped(source.skipped, say)
    with console.waiting_for("the tasks that read rows", explain_silence):
        try:
            rows = read_rows(
                source,
                request.task.training_columns,
                config.seed,
                skip_bad_rows=config.skip_bad_rows,
                is_kept=is_kept,
                workers=plan.most,
            )
        except (RequestError, RowCountError):
            check_unchanged(source)  # which may be the reason
            raise
    check_unchanged(source)
    if request.stored:
        _check_same_rows(request, rows)
    if rows.rejected.total:
        say(f"rejected: {counted(rows.rejected.total, 'row')}: {rows.rejected.describe()}")
    counts = ", ".join(f"{totals.rows:,} {split}" for split, totals in rows.totals.items())
    say(f"run {config.name}: {counts} rows of {source}")
    if not is_kept:
        say("training rows are not kept in memory, but read again in each epoch (--cache)")
    return rows


def run_trainer(
    request: TrainRequest,
    plan: WorkerPlan,
    rows: Rows,
    start: Start,
    record: RunRecord,
    console: Console,
    callbacks: Callbacks,
) -> FinishedModel:
    """Train the epochs that are left with Ray Train, which starts workers again that fail."""
    parameters, max_failures = request.hyperparameters, request.config.max_failures
    done_rows = len(start.history) * rows.totals["train"].rows
    metrics = JobMetrics("train", request.folder.display, done_rows)
    follower = EventFollower(console, metrics, record.add_epoch)
    wait_seconds = max(request.config.wait_seconds, _LEAST_WAIT_SECONDS)
    console.say(f"training with {plan}")
    begun_again = 0
    with (
        follower.following(),
        default_environment(_environment(plan, wait_seconds)),
    ):
        while True:
            loop = LoopConfig(
                task=request.task,
                code=code_of(type(request.task)),
                hyperparameters=parameters,
                threads=plan.threads,
                totals=rows.totals,
                rows_of_block=rows.rows_of_block,
                queue=follower.queue,
                start=start,
            )
            trainer = make_trainer(request, plan, rows, loop, callbacks)
            try:
                with ctrl_c_as_before():
                    finished: FinishedModel = trainer.fit().return_value
                    return finished
            except ray.train.TrainingFailedError as error:
                check_storage(request.folder)
                if not is_worth_a_try(error) or begun_again == max_failures:
                    raise explain_end(error, request, plan, wait_seconds, console) from error
                begun_again += 1
                console.say(f"Ray Train gave up: {root_cause(error)}; trying again")
                start = find_start(request, console)


def find_start(request: TrainRequest, console: Console) -> Start:
    """Find the newest checkpoint, or else the weights of `--init-from`."""
    damaged: list[str] = []
    found = newest_checkpoint(request.folder, damaged.append)
    for line in damaged:
        console.say(line)
    if found is not None:
        checkpoint, state = found
        if state.task != request.task.name:
            other = f"is of the task {state.task}, and not {request.task.name}"
            raise RequestError(f"--resume: checkpoint {checkpoint.display} {other}")
        return Start(checkpoint, state.history)
    if request.stored or damaged:
        console.say("no checkpoint can be used, so the run starts from the beginning")
    model = request.config.init_from
    if model is None:
        return Start()
    loaded = load_model(locate(model, "--init-from"), type(request.task))
    init_from = {"model": model, "sha256": loaded.description["sha256"]}
    return Start(weights=loaded.network.state_dict(), init_from=init_from)


def _check_same_rows(request: TrainRequest, rows: Rows) -> None:
    """RequestError: the rows are not those of the run that goes on."""
    data = request.stored["data"]
    if data["fingerprint"] != rows.fingerprint:
        raise RequestError(
            f"--resume: the rows are not those of the run, from {data['location']} (fingerprint "
            f"{rows.fingerprint[:12]}…, the run has {data['fingerprint'][:12]}…); name "
            "the same data, or start another run"
        )


def _environment(plan: WorkerPlan, wait_seconds: float) -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    joined = "0" if started_cluster() else "1"
    # An elastic run tries with fewer workers after the timeout.
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(30 if plan.is_elastic else wait_seconds),
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s
        # more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away. The process that asks
        # takes a second to start, and a cluster of this job alone loses no node.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": joined,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
