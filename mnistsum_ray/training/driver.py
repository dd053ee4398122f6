"""Driver of a training run: reserve resources, place the rows, run Ray Train, publish the result."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import ray.exceptions
import ray.train

from mnistsum_ray.cluster.gpu import check_cuda, drop_unusable_gpus, probe_gpu
from mnistsum_ray.cluster.ray_internals import start_autoscaling_coordinator
from mnistsum_ray.cluster.resources import inspect_cluster, wait_until_free
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.cluster.signals import defer_signals
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, one_line, root_cause
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import PARAMETERS
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.metrics import TrainingMetrics
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.storage.listing import report_skipped
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock, folder_lock
from mnistsum_ray.training.artifacts import (
    build_manifest,
    check_data,
    mlflow_run,
    publish_model,
    read_history,
    write_data_files,
    write_history,
    write_report,
)
from mnistsum_ray.training.checkpoint import delete_other_checkpoints, latest_valid_checkpoint
from mnistsum_ray.training.fetch import load_rows, stream_rows
from mnistsum_ray.training.finalize import TrainingResult
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.preflight import TrainingRun, read_manifest
from mnistsum_ray.training.resources import ResourcePlan, check_memory, plan_resources
from mnistsum_ray.training.worker import Events, InterruptibleTrainer, RunCallback, event_queue

if TYPE_CHECKING:
    from mnistsum_ray.reporting.mlflow import MLflowRun

_RESIZE_SECONDS: Final = 30.0
"""Seconds between checks whether an elastic run can have more workers; growing goes on from the last checkpoint."""

_MIN_START_SECONDS: Final = 60.0

_EVENT_SECONDS: Final = 1.0
"""Time in which a failure that a worker has reported arrives here."""

_TEST_FIELDS: Final = ("rows", "pairs", "loss", *(f"{head.name}_accuracy" for head in HEADS))


def fit(run: TrainingRun, console: Console) -> dict[str, Any]:
    """Train on the cluster that this process is connected to.

    Returns:
        The fields of the job's JSON line, see `api.fit`.

    Raises:
        RequestError: the cluster is too small, a row of the data cannot be used, or another run writes to the run folder.
        RunError: the loss became infinite, workers failed more often than `--max-failures`, or the storage cannot be written.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        start_autoscaling_coordinator()
        plan = _reserve(run, console.say)
        with folder_lock(run.folder, "--name", console.say) as lock:
            return _fit(run, plan, lock, console)
    except OSError as error:
        raise RunError(f"--storage-path {run.storage.display}: {one_line(error)}; {run.how_to_resume()}") from error
    except ray.exceptions.RayError as error:  # of the driver; failures of workers are handled below
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {run.how_to_resume()}") from error


def _reserve(run: TrainingRun, say: Callable[[str], None]) -> ResourcePlan:
    """Plan the workers and wait until their resources are free."""
    config, source = run.config, run.source
    cluster, probe = drop_unusable_gpus(inspect_cluster(), config.use_gpu, config.wait_seconds, say)
    batch_size, gpus = run.hyperparameters.batch_size, int(cluster.total.get("GPU", 0))
    plan = plan_resources(config, cluster, batch_size)
    if plan.use_gpu and config.num_workers is None and plan.workers[0] < gpus:
        say(
            f"training on {plan.workers[0]} of {gpus} GPUs: with --batch-size {batch_size} more are not faster; --num-workers "
            f"{gpus} takes all"
        )
    if cluster.can_grow and not plan.use_gpu and config.use_gpu is None:
        say(f"training on CPUs, since the cluster has {cluster.describe()}; --use-gpu true waits for GPUs")
    if source.notice:
        say(source.notice)
    report_skipped(source.skipped, say)
    wait_until_free(plan.bundles(), config.wait_seconds, say)
    if plan.use_gpu and probe is None:  # the GPU nodes were started during the wait
        check_cuda(probe_gpu(config.wait_seconds), config.use_gpu)
    read = {} if source.files is None else {"--data": source.files.location(0)}
    check_shared_storage({"--storage-path": run.storage}, read, say)
    return plan


def _fit(run: TrainingRun, plan: ResourcePlan, lock: FolderLock, console: Console) -> dict[str, Any]:
    started, source = time.monotonic(), run.source
    lines = check_memory(run, plan, inspect_cluster())
    rows = stream_rows(source.files) if source.files and run.shuffle.streamed else load_rows(source)
    for line in lines:  # after the rows have been read: a refusal is one line
        console.say(line)
    manifest = build_manifest(run, rows.checksums, plan)
    expected = check_data(run, rows.checksums, manifest["data"])
    manifest, start = _resume(run, manifest, console.say) if run.config.resume else (manifest, None)
    manifest_file = run.folder / "manifest.json"
    if not run.config.resume and manifest_file.exists():  # checked again, since waiting and reading may have taken long
        raise RequestError(f"--name {run.config.name}: another run has taken it meanwhile; choose another name")
    history = read_history(run.folder) if run.config.resume else []

    def mark(status: str) -> None:
        if manifest["status"] == "finished":
            return
        with suppress(OSError, RunError, KeyboardInterrupt):
            lock.check()  # the folder may belong to another run by now
            manifest_file.write_json(manifest | {"status": status})

    def on_epoch(line: dict[str, Any]) -> None:
        history[:] = [earlier for earlier in history if earlier["epoch"] < line["epoch"]] + [line]
        try:
            lock.check()
            write_history(run.folder, history)
        except (OSError, RunError) as error:  # it is written again after the next epoch
            console.say(f"history.jsonl: {one_line(error)}")
        if mlflow:
            mlflow.log_epoch(line, console.say)

    with mlflow_run(run.config, manifest, console) as mlflow:
        try:
            if source.files:
                write_data_files(run.folder, source.files, rows.checksums if expected is None else expected)
            manifest_file.write_json(manifest)
            console.say(
                f"run {run.config.name}: {len(source.train):,} training, {len(source.validation):,} validation and "
                f"{len(source.test):,} test rows of {source.name} ({source.location}); {manifest['workers']}"
            )
            with event_queue(console, on_epoch, TrainingMetrics(run.folder.display).add) as events:
                loop = LoopConfig(
                    run.hyperparameters,
                    run.config.checkpoint_seconds,
                    rows.data,
                    run.shuffle,
                    source.validation,
                    source.test,
                    checksums=expected,
                    events=events.queue,
                    start=start,
                    lock=lock,
                )
                trainer = _trainer(run, plan, loop)
                try:
                    result = _train(trainer, run, start, lock, events, console)
                except KeyboardInterrupt:
                    mark("stopped")  # first, since a cluster gives a stopped job only a few seconds
                    trainer.abort()
                    lock.check()
                    raise
            return _publish(run, manifest, result, lock, mlflow, started, console)
        except KeyboardInterrupt:
            mark("stopped")
            raise RunInterrupted(run.how_to_resume()) from None
        except (RunError, OSError, ray.exceptions.RayError):
            mark("failed")
            raise


def _resume(run: TrainingRun, manifest: dict[str, Any], say: Callable[[str], None]) -> tuple[dict[str, Any], Location | None]:
    """The manifest of a run that is resumed, and the checkpoint that it starts from.

    Raises:
        RequestError: it is finished, and has no checkpoint.
    """
    stored, data = read_manifest(run.folder, "--resume"), manifest["data"]
    # The stored config names the data that `--data auto` found, so only the first manifest says that it is not full MNIST.
    data |= {"notice": data["notice"] or stored["data"]["notice"], "sha256": data["sha256"] or stored["data"]["sha256"]}
    start = latest_valid_checkpoint(run.folder, say)
    if start is None and stored.get("status") == "finished":
        raise RequestError(
            f"--resume: run {run.config.name} is finished, and no checkpoint is left to resume from; its model stays as it is, "
            "start another run"
        )
    if start is None:
        say("no checkpoint can be used, so the run starts from the beginning")
    delete_other_checkpoints(run.folder, start)
    return stored | manifest, start  # results of the stored one stay until there are new ones


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


def _train(
    trainer: InterruptibleTrainer,
    run: TrainingRun,
    start: Location | None,
    lock: FolderLock,
    events: Events,
    console: Console,
) -> TrainingResult:
    """Run Ray Train to its end, and delete the checkpoint that it started from; the result of rank 0.

    Raises:
        RunError: the workers failed more often than `--max-failures`, or with an error that another attempt would repeat, such
            as a file that has changed.
    """

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
        with default_environment(_train_environment(run.config)), trainer.aborted_by(must_end):
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        lock.check()  # if another run has taken the folder, that is the cause
        if events.failed.wait(_EVENT_SECONDS):
            raise RunError(events.failure) from error
        if isinstance(error, ray.exceptions.RayActorError):
            raise
        console.say_lines(str(error))
        raise RunError(
            f"gave up after {run.config.max_failures + 1} failures: the workers failed or could not be started, see above; "
            f"{run.how_to_resume()}"
        ) from error
    lock.check()
    if result.checkpoint and start:
        try:
            start.filesystem.delete_dir(start.path)  # Ray Train keeps two of its own, and does not know this one
        except OSError as error:
            console.say(f"{start.display} is no longer needed, and cannot be deleted: {one_line(error)}")
    assert result.return_value is not None, "rank 0 returns a result"
    return TrainingResult(**result.return_value)


def _train_environment(config: TrainConfig) -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    return {
        # How long Ray Train waits for the resources of a worker group, in each attempt.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(_MIN_START_SECONDS, config.wait_seconds / (config.max_failures + 1))),
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away.
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }


def _publish(
    run: TrainingRun,
    manifest: dict[str, Any],
    result: TrainingResult,
    lock: FolderLock,
    mlflow: "MLflowRun | None",
    started: float,
    console: Console,
) -> dict[str, Any]:
    """Publish the model, write the report, complete the manifest; return the fields of the job's JSON line."""
    lock.check()
    if run.source.files and result.checksums is not None:
        write_data_files(run.folder, run.source.files, result.checksums)
        manifest["data"]["sha256"] = run.source.content_sha256(result.checksums)
    card = publish_model(run.folder, result)
    write_history(run.folder, result.history)
    steady = result.history[1:] or result.history  # the first epoch includes one-time work such as loading kernels
    trained, seconds = sum(line["rows_per_second"] * line["seconds"] for line in steady), sum(line["seconds"] for line in steady)
    summary = {
        "run": run.folder.display,
        "model": (run.folder / "model").display,
        "parameters": PARAMETERS,
        "data": {key: manifest["data"][key] for key in ("source", "train_rows", "validation_rows", "test_rows")},
        "test": {key: card["test"][key] for key in _TEST_FIELDS},
        "images_per_second": round(trained / seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    manifest |= {
        "status": "finished",
        "metrics": summary,
        "hardware": result.hardware,
        "precision": result.precision,
        "error_analysis": result.error_analysis.as_json(),
    }
    lock.check()
    files = write_report(run, manifest, card, result)
    lock.check()
    manifest_file = run.folder / "manifest.json"
    with defer_signals():  # a run that is finished is not stopped
        manifest_file.write_json(manifest)
    if mlflow:
        logged = mlflow.finish(result.history, card, run.folder, files, console.say)
        summary["mlflow"] = mlflow.run_id if logged else None
        manifest_file.write_json(manifest)
    console.say(f"model: {summary['model']}")
    console.say(f"report: {(run.folder / REPORT).display}")
    return summary
