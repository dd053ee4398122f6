"""A training run, seen from the driver: load the data, fit, publish the best model."""

import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.data.dataset import MaterializedDataset
from ray.util.queue import Queue

from mnistsum_ray.cluster.gpu import check_cuda, probe_gpu, usable_cluster
from mnistsum_ray.cluster.resources import inspect_cluster, wait_until_free
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.data.parquet_parts import ParquetPart
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, last_line, one_line
from mnistsum_ray.model.network import PARAMETERS
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.report import REPORT
from mnistsum_ray.storage.listing import report_skipped
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import Fence, OutputLock, output_lock
from mnistsum_ray.training import pipeline
from mnistsum_ray.training.artifacts import build_manifest, publish_model, write_report
from mnistsum_ray.training.checkpoints import delete_other_checkpoints, latest_valid_checkpoint
from mnistsum_ray.training.preflight import TrainingRun, read_manifest
from mnistsum_ray.training.resources import ResourcePlan, plan_resources
from mnistsum_ray.training.trainer import LoopConfig, TrainingResult, train_loop_per_worker

if TYPE_CHECKING:
    from mnistsum_ray.reporting.mlflow import MLflowRun
from mnistsum_ray.training.callbacks import InterruptibleTrainer, RunCallback
from mnistsum_ray.training.events import event_queue
from mnistsum_ray.training.tracking import mlflow_run

_GROWTH_SECONDS: Final = 30.0
"""Between two looks whether an elastic run can have more workers; growing costs what is done of the epoch."""


def fit(run: TrainingRun, console: Console) -> dict[str, Any]:
    """Train on the cluster that this process is connected to.

    Returns:
        The fields of the job's last line (see the README).

    Raises:
        RequestError: the cluster cannot carry it, a row of the data is not what it should be, or another run writes in its folder.
        RunError: the loss became infinite, workers failed more often than `--max-failures`, or the storage cannot be written.
        RunInterrupted: it was interrupted.
    """
    try:
        plan = _allotted(run, console)
        with output_lock(run.folder, "--name", console.say) as held:
            return _fit(run, plan, held, console)
    except OSError as error:
        raise RunError(f"--storage-path {run.storage.display}: {one_line(error)}; {_goes_on(run)}") from error
    except ray.exceptions.RayError as error:  # of the workers' failures Ray Train tells otherwise, see below
        console.say_lines(str(error))
        raise RunError(f"{last_line(error)}; {_goes_on(run)}") from error


def _goes_on(run: TrainingRun) -> str:
    return f"what is saved stays, and --name {run.config.name} --resume goes on"


def _stopped(run: TrainingRun) -> RunInterrupted:
    flags = ["--storage-path", run.storage.display, "--name", str(run.config.name), "--resume"]
    return RunInterrupted(f"what is saved stays, and this goes on: python jobs/train.py {shlex.join(flags)}")


def _fit(run: TrainingRun, plan: ResourcePlan, held: OutputLock, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    config, source = run.config, run.source
    loaded = pipeline.materialize_source(source)
    manifest = build_manifest(run, loaded.fingerprint, _workers_text(plan))
    place, start = run.folder / "manifest.json", None
    if config.resume:
        stored = read_manifest(run.folder)
        manifest = _going_on(stored, manifest)
        start = latest_valid_checkpoint(run.folder, console.say)
        if start is None and stored.get("status") == "finished":
            raise RequestError(
                f"--resume: run {config.name} is finished, and no checkpoint is left to go on from; its model stays as it is, "
                "start another run"
            )
        delete_other_checkpoints(run.folder, start)
    elif place.exists():  # again, since all of the waiting and reading lies between
        raise RequestError(f"--name {config.name}: another run has taken it meanwhile; choose another name")
    with mlflow_run(run, manifest, console) as mlflow:

        def stopped() -> None:
            with suppress(OSError, KeyboardInterrupt):
                place.write_json(manifest | {"status": "stopped"})

        try:
            place.write_json(manifest)
            console.say(
                f"run {config.name}: {len(source.train):,} training, {len(source.validation):,} validation and "
                f"{len(source.test):,} test rows of {source.name} ({source.location}); {manifest['workers']}"
            )
            with event_queue(console, lambda entry: mlflow.tell(entry, console.say) if mlflow else None) as events:
                outcome, checkpoint = _train(run, plan, loaded.images, start, held, events, console, stopped)
            return _finish(run, manifest, outcome, checkpoint, held.fence, mlflow, started, console)
        except KeyboardInterrupt:
            if not held.lost.is_set():
                stopped()
            raise _stopped(run) from None


def _finish(
    run: TrainingRun,
    manifest: dict[str, Any],
    outcome: TrainingResult,
    checkpoint: ray.train.Checkpoint,
    fence: Fence,
    mlflow: "MLflowRun | None",
    started: float,
    console: Console,
) -> dict[str, Any]:
    """Publish the model, the report and the last of the manifest; the fields of the job's last line."""
    fence.check()
    # A kill may have come between the last epoch and its publication.
    card = publish_model(run.folder, checkpoint, outcome.history, outcome.card)
    summary = {
        "run": run.folder.display,
        "model": (run.folder / "model").display,
        "parameters": PARAMETERS,
        "data": {key: manifest["data"][key] for key in ("source", "train_rows", "validation_rows", "test_rows")},
        "test": card["test"],
        "images_per_second": round(_steady_speed(outcome.history), 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    manifest |= {
        "status": "finished",
        "metrics": summary,
        "hardware": outcome.hardware,
        "precision": outcome.precision,
        "examination": outcome.examination.as_json(),
    }
    fence.check()
    written = write_report(run, manifest, card, outcome)
    fence.check()
    place = run.folder / "manifest.json"
    place.write_json(manifest)
    if mlflow:
        told = mlflow.finish(outcome.history, card, run.folder, written, console.say)
        summary["mlflow"] = mlflow.run_id if told else None
        place.write_json(manifest)
    console.say(f"model: {summary['model']}")
    console.say(f"report: {(run.folder / REPORT).display}")
    return summary


def _allotted(run: TrainingRun, console: Console) -> ResourcePlan:
    """What the run takes of the cluster, once that is free."""
    config, source = run.config, run.source
    cluster, probe = usable_cluster(inspect_cluster(), config.use_gpu, config.wait_seconds, console.say)
    plan = plan_resources(config, cluster)
    if cluster.can_grow and not plan.use_gpu and config.use_gpu is None:
        console.say(f"training on CPUs, since the cluster has {cluster.describe()}; --use-gpu true waits for GPUs")
    if source.notice:
        console.say(source.notice)
    report_skipped(source.skipped, console.say)
    wait_until_free(plan.bundles(), config.wait_seconds, console.say)
    if plan.use_gpu and probe is None:  # the GPUs have come while it waited
        check_cuda(probe_gpu(config.wait_seconds), config.use_gpu)
    first = source.parts[0]
    read = {"--data": first.location} if isinstance(first, ParquetPart) else {}
    check_shared_storage({"--storage-path": run.storage}, read, console.say)
    pipeline.configure_ray_data()
    return plan


def _going_on(stored: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on: what it had come to stays until there is something new.

    Raises:
        RequestError: the data are others.
    """
    data, then = manifest["data"], stored["data"]
    if then["sha256"] != data["sha256"]:
        raise RequestError(
            f"--resume: the data are not those of the run (SHA-256 {data['sha256'][:12]}…, the run has {then['sha256'][:12]}… "
            f"from {then['location']}); name the same data, or start another run"
        )
    # What --data auto had led to is all that is named now, so only the first time it was said that it is not full MNIST.
    return stored | manifest | {"data": data | {"notice": data["notice"] or then["notice"]}}


def _steady_speed(history: list[dict[str, Any]]) -> float:
    """Training rows a second, without the first epoch, in which much happens for the first time."""
    steady = history[1:] or history
    return float(sum(line["rows_per_second"] * line["seconds"] for line in steady) / sum(line["seconds"] for line in steady))


def _train(
    run: TrainingRun,
    plan: ResourcePlan,
    images: MaterializedDataset,
    start: Location | None,
    held: OutputLock,
    events: Queue,
    console: Console,
    stopped: Callable[[], None],
) -> tuple[TrainingResult, ray.train.Checkpoint]:
    """Run Ray Train to its end; `stopped` is called first where it is interrupted, since a cluster gives a job few seconds."""
    config, source = run.config, run.source
    first = ray.train.Checkpoint(start.path, start.filesystem) if start else None
    loop = LoopConfig(run.hyperparameters, source.train, source.validation, source.test, events, first, held.fence)
    fewest, most = plan.workers
    # Without these two, a worker group that no longer fits is tried again for ever.
    attempts = config.max_failures + 1
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(max(60.0, config.wait_seconds / attempts))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a lost worker, or the end, is seen
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # some clouds give a node 30 s, and not two minutes
    failures = ray.train.FailureConfig(max_failures=config.max_failures, controller_failure_limit=config.max_failures)
    trainer = InterruptibleTrainer(
        train_loop_per_worker,
        train_loop_config={"loop": loop},
        scaling_config=ray.train.ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=plan.use_gpu,
            resources_per_worker=plan.per_worker,
            # A CPU worker uses all cores of its node, whatever it reserves; GPUs talk fastest within one.
            placement_strategy="PACK" if plan.use_gpu else "SPREAD",
            elastic_resize_monitor_interval_s=_GROWTH_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=run.storage.path,
            storage_filesystem=run.storage.filesystem,
            failure_config=failures,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[RunCallback(run.folder, events, held.fence)],
        ),
        datasets={"images": images},
        # Not split: that would drop up to a row a worker. Each worker takes its rows by arithmetic, see gather.Schedule.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    try:
        with held.interrupting():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        console.say_lines(str(error))
        raise RunError(
            f"gave up after {config.max_failures + 1} failures of the workers; once the cause is gone, "
            f"--name {config.name} --resume goes on from the last checkpoint"
        ) from error
    except KeyboardInterrupt:
        if not held.lost.is_set():
            stopped()
        trainer.abort()
        held.check()
        raise
    held.fence.check()
    answer = result.return_value or {}
    if "error" in answer:
        raise RunError(answer["error"])
    last = result.checkpoint or first  # nothing was left to train
    assert last is not None, "a run of at least one epoch leaves a checkpoint"
    if result.checkpoint and start:
        start.filesystem.delete_dir(start.path)  # Ray Train, which keeps two, knows nothing of it
    return TrainingResult(**answer), last


def _workers_text(plan: ResourcePlan) -> str:
    fewest, most = plan.workers
    number = str(fewest) if fewest == most else f"{fewest} to {most}"
    return f"{number} {'GPU' if plan.use_gpu else 'CPU'} worker{'s' * (most != 1)}"
