"""Driver of a training run: reserve resources, read the data, run Ray Train, publish the result."""

import time
from contextlib import suppress
from typing import Any

import ray.exceptions
import torch

from mnistsum_ray.cluster.gpu import check_cuda, drop_unusable_gpus, probe_gpu
from mnistsum_ray.cluster.ray_internals import start_autoscaling_coordinator
from mnistsum_ray.cluster.resources import inspect_cluster, wait_until_free
from mnistsum_ray.cluster.shared_storage import check_shared_storage
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, one_line, root_cause
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.metrics import TrainingMetrics
from mnistsum_ray.storage.listing import report_skipped
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock, folder_lock
from mnistsum_ray.training.artifacts import Checksums, build_manifest, read_history, write_data_files, write_history
from mnistsum_ray.training.checkpoint import delete_other_checkpoints, latest_valid_checkpoint
from mnistsum_ray.training.events import event_queue
from mnistsum_ray.training.preflight import TrainingRun, read_manifest
from mnistsum_ray.training.prepare import check_data, prepare_rows
from mnistsum_ray.training.publish import publish_run
from mnistsum_ray.training.ray_train import run_ray_train
from mnistsum_ray.training.resources import ResourcePlan, plan_resources
from mnistsum_ray.training.tracking import mlflow_run


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
        plan = _reserve(run, console)
        with folder_lock(run.folder, "--name", console.say) as lock:
            return _fit(run, plan, lock, console)
    except OSError as error:
        raise RunError(f"--storage-path {run.storage.display}: {one_line(error)}; {run.how_to_resume()}") from error
    except ray.exceptions.RayError as error:  # of the driver; failures of workers are handled in ray_train.py
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {run.how_to_resume()}") from error


def _reserve(run: TrainingRun, console: Console) -> ResourcePlan:
    """Plan the workers and wait until their resources are free."""
    config, source = run.config, run.source
    cluster, probe = drop_unusable_gpus(inspect_cluster(), config.use_gpu, config.wait_seconds, console.say)
    batch_size, gpus = run.hyperparameters.batch_size, int(cluster.total.get("GPU", 0))
    plan = plan_resources(config, cluster, batch_size)
    if plan.use_gpu and config.num_workers is None and plan.workers[0] < gpus:
        console.say(
            f"training on {plan.workers[0]} of {gpus} GPUs: with --batch-size {batch_size} more are not faster; --num-workers "
            f"{gpus} takes all"
        )
    if cluster.can_grow and not plan.use_gpu and config.use_gpu is None:
        console.say(f"training on CPUs, since the cluster has {cluster.describe()}; --use-gpu true waits for GPUs")
    if source.notice:
        console.say(source.notice)
    report_skipped(source.skipped, console.say)
    wait_until_free(plan.bundles(), config.wait_seconds, console.say)
    if plan.use_gpu and probe is None:  # the GPU nodes were started during the wait
        check_cuda(probe_gpu(config.wait_seconds), config.use_gpu)
    read = {} if source.files is None else {"--data": source.files.location(0)}
    check_shared_storage({"--storage-path": run.storage}, read, console.say)
    return plan


def _fit(run: TrainingRun, plan: ResourcePlan, lock: FolderLock, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    source = run.source
    rows, shuffle = prepare_rows(run, plan, console.say)
    manifest, start, expected = _start(run, build_manifest(run, rows.checksums, plan), rows.checksums, console)
    manifest_file = run.folder / "manifest.json"
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

    with mlflow_run(run, manifest, console) as mlflow:
        try:
            manifest_file.write_json(manifest)
            if source.files:
                write_data_files(run.folder, source.files, rows.checksums if expected is None else expected)
            console.say(
                f"run {run.config.name}: {len(source.train):,} training, {len(source.validation):,} validation and "
                f"{len(source.test):,} test rows of {source.name} ({source.location}); {manifest['workers']}"
            )
            metrics = TrainingMetrics(run.folder.display)
            with event_queue(console, on_epoch, metrics.add) as events:
                checksums = None if expected is None else torch.tensor(expected)
                result = run_ray_train(run, plan, rows, shuffle, checksums, start, lock, events, console, lambda: mark("stopped"))
            return publish_run(run, manifest, result, lock, mlflow, started, console)
        except KeyboardInterrupt:
            mark("stopped")
            raise RunInterrupted(run.how_to_resume()) from None
        except (RunError, OSError, ray.exceptions.RayError):
            mark("failed")
            raise


def _start(
    run: TrainingRun, manifest: dict[str, Any], read: Checksums, console: Console
) -> tuple[dict[str, Any], Location | None, Checksums]:
    """Manifest of the run as it starts, the checkpoint that it resumes from, and checksums that streamed rows must have.

    Raises:
        RequestError: the name has been taken since preflight, or the run cannot be resumed.
    """
    name = run.config.name
    if not run.config.resume:
        expected = check_data(run, read, manifest, None)
        if (run.folder / "manifest.json").exists():  # checked again, since waiting and reading may have taken long
            raise RequestError(f"--name {name}: another run has taken it meanwhile; choose another name")
        return manifest, None, expected
    stored = read_manifest(run.folder)
    expected = check_data(run, read, manifest, stored)
    # The stored config names the data that `--data auto` found, so only the first manifest says that it is not full MNIST.
    data = manifest["data"]
    data |= {"notice": data["notice"] or stored["data"]["notice"], "sha256": data["sha256"] or stored["data"]["sha256"]}
    manifest = stored | manifest  # results of the stored one stay until there are new ones
    start = latest_valid_checkpoint(run.folder, console.say)
    if start is None and stored.get("status") == "finished":
        raise RequestError(
            f"--resume: run {name} is finished, and no checkpoint is left to resume from; its model stays as it is, "
            "start another run"
        )
    if start is None:
        console.say("no checkpoint can be used, so the run starts from the beginning")
    delete_other_checkpoints(run.folder, start)
    return manifest, start, expected
