"""The training job: read the rows with Ray Data, train with a Ray Train TorchTrainer, publish.

    read_rows ─▶ TorchTrainer(train_loop_per_worker, datasets, EveryRow).fit() ─▶ publish

Ray owns failures and waiting: `FailureConfig` starts workers again that are lost, and its timeout
of the start ends a run that cannot get them. What Ray gives up ends the job with one line, and
`--resume` continues at the newest whole checkpoint.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import ray.data.exceptions
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.resources import (
    WorkerPlan,
    describe_free,
    fits_in_store,
    plan_training,
    wait_for,
)
from mnistsum_ray.cluster.workarounds import ctrl_c_as_before, default_environment
from mnistsum_ray.data.inputs import report_skipped
from mnistsum_ray.data.sources import check_unchanged
from mnistsum_ray.errors import (
    RepeatingError,
    RequestError,
    RowCountError,
    RunError,
    RunInterrupted,
    StorageError,
    TryAgainError,
    counted,
    ended_by_storage,
    root_cause,
    shortened,
)
from mnistsum_ray.model.finished import FinishedModel
from mnistsum_ray.model.folder import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    LoadedModel,
    copy_weights,
    load_model,
)
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.report import versions
from mnistsum_ray.reporting.results import TrainResult
from mnistsum_ray.storage.uri import arrow_uri, folder_lock, locate
from mnistsum_ray.task_loader import code_of
from mnistsum_ray.training.checkpoint import CHECKPOINTS
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.progress import EventFollower, FailureLines, explain_silence
from mnistsum_ray.training.record import RunRecord
from mnistsum_ray.training.request import TrainRequest
from mnistsum_ray.training.rows import EveryRow, Rows, read_rows

_STARTS: Final = 4
"""Attempts to start the workers. Each gets an equal share of `--wait-seconds`."""

_LEAST_WAIT_SECONDS: Final = 10.0
"""Minimum wait for workers: Ray needs a moment even if all resources are free."""

Callbacks = Sequence[ray.train.UserCallback]


def make_trainer(
    request: TrainRequest, plan: WorkerPlan, rows: Rows, loop: LoopConfig, callbacks: Callbacks
) -> TorchTrainer:
    """Return the trainer: the loop of each worker, the Datasets and how ranks share them."""
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
                controller_failure_limit=_STARTS - 1,
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def train(request: TrainRequest, console: Console, callbacks: Callbacks = ()) -> TrainResult:
    """Train on the cluster that this process is connected to; errors are those of `api.fit`."""
    started = time.monotonic()
    config, stored = request.config, request.stored
    with folder_lock(request.folder, "--name"):
        with errors_in_one_line(console, "nothing was begun; the same command tries again"):
            files = [request.folder / "model" / name for name in (WEIGHTS_FILE, DESCRIPTION_FILE)]
            has_model = all(file.exists() for file in files)
            if stored.get("status") == "finished" and has_model:  # else it is made again
                console.say("the run is finished")
                return TrainResult(**stored["metrics"])
            init_model = load_init_model(request)
            # The tasks that read rows need a CPU, and a plan needs to see a node.
            wait_for({"CPU": 1}, "the tasks that read rows", config.wait_seconds, console.say)
            is_kept = config.cache is True
            if config.cache == "auto":
                is_kept = fits_in_store(request.source.stored_bytes(request.task.training_columns))
            batch_size = request.hyperparameters.batch_size
            threads = stored.get("threads")
            plan = plan_training(config, batch_size, console.say, threads, is_kept=is_kept)
            say_what_differs(stored, plan, console.say)
            rows = read(request, plan, console, is_kept=is_kept)
            record = RunRecord(request, plan)
            record.begin(rows, init_model)
        with errors_in_one_line(console, request.how_to_resume):
            metrics = JobMetrics("train", request.folder.display)
            try:
                finished = run_trainer(
                    request, plan, rows, init_model, record, metrics, console, callbacks
                )
                result = record.publish(finished, time.monotonic() - started, console.say)
                metrics.set(last_success_seconds=time.time())
                return result
            except KeyboardInterrupt:
                record.write_status("stopped")
                raise RunInterrupted(request.how_to_resume) from None
            except BaseException:
                record.write_status("failed")
                raise


@contextmanager
def errors_in_one_line(console: Console, how_to_resume: str) -> Iterator[None]:
    """Raise errors of Ray and of the storage in the block as a RunError that says how to resume."""
    try:
        yield
    except ray.train.WorkerGroupError as error:
        problem = "workers have failed more often than --max-failures allows, see above"
        raise RunError(f"{problem}; {how_to_resume}") from error
    except ray.train.ControllerError as error:
        cause = error.controller_failure
        if isinstance(cause, RepeatingError):
            raise RunError(str(cause)) from error
        if isinstance(cause, StorageError):
            raise ended_by_storage(cause, how_to_resume) from error
        console.say_lines(str(error))
        # Ray Train's own errors, such as of a start that timed out, have types that are private.
        what, _, _ = root_cause(cause).partition(". ")  # Ray's advice follows
        problem = f"Ray Train gave up: {type(cause).__name__}: {what}"
        is_of_code = isinstance(cause, ray.exceptions.RayTaskError)
        if type(cause).__module__.startswith("ray.") and not is_of_code:
            raise TryAgainError(f"{problem}; {describe_free()}; {how_to_resume}") from error
        kind = TryAgainError if isinstance(cause, OSError) else RunError
        raise kind(f"{problem}; {how_to_resume}") from error
    except ray.exceptions.RayError as error:  # some are OSErrors too
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {how_to_resume}") from error
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise TryAgainError(
            f"Ray Data has read no rows for a long time; {how_to_resume}"
        ) from error
    except StorageError as error:
        raise ended_by_storage(error, how_to_resume) from error


def load_init_model(request: TrainRequest) -> LoadedModel | None:
    """Return the model of `--init-from`, with whose weights a run begins."""
    model = request.config.init_from
    return load_model(locate(model, "--init-from"), type(request.task)) if model else None


def say_what_differs(stored: dict[str, Any], plan: WorkerPlan, say: Callable[[str], None]) -> None:
    """Say what decides the bits of a resumed run and has changed."""
    if not stored:
        return
    had, has, threads = stored.get("versions", {}), versions(), stored.get("threads")
    keep = f" (as many workers, with --use-gpu false --threads {threads}, keep them)"
    pairs = [(f"{name} {had.get(name)}", f"{name} {has[name]}", "") for name in ("torch", "ray")]
    pairs.append((stored.get("workers", ""), str(plan), keep if threads else ""))
    for before, now, advice in pairs:
        if before != now:
            line = f"the run had {before}, and continues with {now}: its last bits may differ"
            say(line + advice)


def read(request: TrainRequest, plan: WorkerPlan, console: Console, *, is_kept: bool) -> Rows:
    """Read and count the rows, and say which there are, and which are left out.

    RequestError: a resumed run had others.
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
                show_progress=console.progress,
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
    held_out = [split for split in source.ranges("train") if split != "train"]
    if source.files and held_out:
        say(f"no {' or '.join(held_out)} files found: holding out training rows instead")
    for key, missing in rows.missing.items():
        if missing:
            names = request.task.training_columns[key].class_names
            absent = shortened(", ".join(names[number] for number in sorted(missing)))
            say(f"no training row has the {key} {absent}")
    if not is_kept:
        say("training rows are not kept in memory, but read again in each epoch (--cache)")
    return rows


def run_trainer(
    request: TrainRequest,
    plan: WorkerPlan,
    rows: Rows,
    init_model: LoadedModel | None,
    record: RunRecord,
    metrics: JobMetrics,
    console: Console,
    callbacks: Callbacks,
) -> FinishedModel:
    """Train the epochs that are left with Ray Train, which starts workers again that fail."""
    follower = EventFollower(console, metrics, record.add_epoch)
    loop = LoopConfig(
        task=request.task,
        code=code_of(type(request.task)),
        hyperparameters=request.hyperparameters,
        threads=plan.threads,
        totals=rows.totals,
        rows_of_block=rows.rows_of_block,
        queue=follower.queue,
        run=request.folder,
        init_weights=copy_weights(init_model.network) if init_model else None,
    )
    trainer = make_trainer(request, plan, rows, loop, callbacks)
    console.say(f"training with {plan}")
    with (
        follower.following(),
        default_environment(_environment(request.config.wait_seconds)),
        ctrl_c_as_before(),
    ):
        finished: FinishedModel = trainer.fit().return_value
        return finished


def _check_same_rows(request: TrainRequest, rows: Rows) -> None:
    """Raise RequestError if the rows are not those of the resumed run."""
    data = request.stored["data"]
    if data["fingerprint"] != rows.fingerprint:
        raise RequestError(
            f"--resume: the rows are not those of the run, from {data['location']} (fingerprint "
            f"{rows.fingerprint[:12]}…, the run has {data['fingerprint'][:12]}…); name "
            "the same data, or start another run"
        )


def _environment(wait_seconds: float) -> dict[str, str]:
    """Return options that Ray Train reads only from environment variables."""
    of_start = max(wait_seconds, _LEAST_WAIT_SECONDS) / _STARTS
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(of_start),
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s
        # more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away. The process that asks
        # takes a second to start, and a cluster of this job alone loses no node.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0" if started_cluster() else "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
