"""Ray Train from the driver's side: configure a TorchTrainer, run it, and turn its outcome into a result or an error."""

from collections.abc import Callable
from typing import Final

import ray.exceptions
import ray.train
import ray.train.torch
import torch

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.data.order import Shuffle
from mnistsum_ray.errors import RunError, one_line
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.callbacks import InterruptibleTrainer, RunCallback
from mnistsum_ray.training.events import Events
from mnistsum_ray.training.fetch import LoadedRows
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.resources import ResourcePlan

_RESIZE_SECONDS: Final = 30.0
"""Seconds between checks whether an elastic run can have more workers; growing goes on from the last checkpoint."""

_MIN_START_SECONDS: Final = 60.0

_EVENT_SECONDS: Final = 1.0
"""Time in which a failure that a worker has reported arrives here."""


def run_ray_train(
    run: TrainingRun,
    plan: ResourcePlan,
    rows: LoadedRows,
    shuffle: Shuffle,
    checksums: torch.Tensor | None,
    start: Location | None,
    lock: FolderLock,
    events: Events,
    console: Console,
    on_interrupt: Callable[[], None],
) -> TrainingResult:
    """Run Ray Train to its end.

    Args:
        run: config, rows of each split, and folders.
        plan: workers and what each reserves.
        rows: of the source.
        shuffle: order of the training rows.
        checksums: see `LoopConfig`.
        start: checkpoint to resume from.
        lock: on the run folder.
        events: queue from the workers to the console.
        console: shows the text of a failure.
        on_interrupt: called first on an interrupt, since a cluster gives a stopped job only a few seconds.

    Returns:
        The result of rank 0.

    Raises:
        RunError: the workers failed more often than `--max-failures`, or with an error that another attempt would repeat, such
            as a file that has changed.
    """
    config = run.config
    resume_from = ray.train.Checkpoint(start.path, start.filesystem) if start else None
    loop = LoopConfig(
        run.hyperparameters,
        config.checkpoint_seconds,
        rows.data,
        shuffle,
        run.source.validation,
        run.source.test,
        checksums=checksums,
        events=events.queue,
        start=resume_from,
        lock=lock,
    )
    trainer = _trainer(run, plan, loop)

    def must_end() -> bool:
        """Whether a worker has met what another attempt would meet again, or the folder is lost."""
        try:
            lock.check()
        except RunError:
            return True
        except OSError:  # the storage may not answer for a moment
            pass
        return events.failed.is_set()

    try:
        with default_environment(_train_environment(config)), trainer.aborted_by(must_end):
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        lock.check()  # if another run has taken the folder, that is the cause
        if events.failed.wait(_EVENT_SECONDS):
            raise RunError(events.failure) from error
        if isinstance(error, ray.exceptions.RayActorError):
            raise
        console.say_lines(str(error))
        raise RunError(
            f"gave up after {config.max_failures + 1} failures: the workers failed or could not be started, see above; "
            f"{run.how_to_resume()}"
        ) from error
    except KeyboardInterrupt:
        on_interrupt()
        trainer.abort()
        lock.check()
        raise
    lock.check()
    if result.checkpoint and start:
        try:
            start.filesystem.delete_dir(start.path)  # Ray Train keeps two of its own, and does not know this one
        except OSError as error:
            console.say(f"{start.display} is no longer needed, and cannot be deleted: {one_line(error)}")
    assert result.return_value is not None, "rank 0 returns a result"
    return TrainingResult(**result.return_value)


def _trainer(run: TrainingRun, plan: ResourcePlan, loop: LoopConfig) -> InterruptibleTrainer:
    config = run.config
    min_workers, max_workers = plan.workers
    return InterruptibleTrainer(
        train_loop_per_worker,
        train_loop_config={"loop": loop},
        scaling_config=ray.train.ScalingConfig(
            num_workers=min_workers if min_workers == max_workers else plan.workers,
            use_gpu=plan.use_gpu,
            resources_per_worker=plan.per_worker,
            # A CPU worker uses all cores of its node, so one a node; GPUs exchange gradients fastest within a node.
            placement_strategy="PACK" if plan.use_gpu else "SPREAD",
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=run.storage.path,
            storage_filesystem=run.storage.filesystem,
            # controller_failure_limit: Ray Train's default retries a worker group that no longer fits for ever.
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[RunCallback(loop.events)],
        ),
        # No datasets: Ray Train would split them, and drop up to one row a worker. Each worker makes its own, see rows.py.
    )


def _train_environment(config: TrainConfig) -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    attempts = config.max_failures + 1
    return {
        # How long Ray Train waits for the resources of a worker group, in each attempt.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(_MIN_START_SECONDS, config.wait_seconds / attempts)),
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away.
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
