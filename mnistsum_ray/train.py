"""A training run, seen from the driver: load the data, fit, publish the best model."""

import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from ray.data.dataset import MaterializedDataset
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray import pipeline, resources
from mnistsum_ray.console import SILENCE_SECONDS, Console
from mnistsum_ray.errors import Refusal, RunFailed, Stopped, last_line, one_line
from mnistsum_ray.keep import forget_other_checkpoints, last_whole_checkpoint, manifest_of, publish, write_report
from mnistsum_ray.listing import say_left_out
from mnistsum_ray.lock import Fence, Hold, hold
from mnistsum_ray.loop import LoopConfig, Outcome, train_loop_per_worker
from mnistsum_ray.mnist import ParquetPart
from mnistsum_ray.model import PARAMETERS
from mnistsum_ray.prepare import Run, read_manifest
from mnistsum_ray.reach import refuse_unshared
from mnistsum_ray.report import REPORT
from mnistsum_ray.storage import Location

if TYPE_CHECKING:
    from mnistsum_ray.mlflow import MLflowRun

_ABORT_SECONDS: Final = 3.0

_GROWTH_SECONDS: Final = 30.0
"""Between two looks whether an elastic run can have more workers; growing costs what is done of the epoch."""


def fit(run: Run, console: Console) -> dict[str, Any]:
    """Train on the cluster that this process is connected to.

    Returns:
        The fields of the job's last line (see the README).

    Raises:
        Refusal: the cluster cannot carry it, a row of the data is not what it should be, or another run writes in its folder.
        RunFailed: the loss became infinite, workers failed more often than `--max-failures`, or the storage cannot be written.
        Stopped: it was interrupted.
    """
    try:
        allotment = _allotted(run, console)
        with hold(run.folder, "--name", console.say) as held:
            return _fit(run, allotment, held, console)
    except OSError as error:
        raise RunFailed(f"--storage-path {run.storage.text}: {one_line(error)}; {_goes_on(run)}") from error
    except ray.exceptions.RayError as error:  # of the workers' failures Ray Train tells otherwise, see below
        console.say_lines(str(error))
        raise RunFailed(f"{last_line(error)}; {_goes_on(run)}") from error


def _goes_on(run: Run) -> str:
    return f"what is saved stays, and --name {run.config.name} --resume goes on"


def _stopped(run: Run) -> Stopped:
    flags = ["--storage-path", run.storage.text, "--name", str(run.config.name), "--resume"]
    return Stopped(f"what is saved stays, and this goes on: python jobs/train.py {shlex.join(flags)}")


def _fit(run: Run, allotment: resources.Allotment, held: Hold, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    config, source = run.config, run.source
    loaded = pipeline.load(source)
    manifest = manifest_of(run, loaded.fingerprint, _workers_text(allotment))
    place, start = run.folder / "manifest.json", None
    if config.resume:
        stored = read_manifest(run.folder)
        manifest = _going_on(stored, manifest)
        start = last_whole_checkpoint(run.folder, console.say)
        if start is None and stored.get("status") == "finished":
            raise Refusal(
                f"--resume: run {config.name} is finished, and no checkpoint is left to go on from; its model stays as it is, "
                "start another run"
            )
        forget_other_checkpoints(run.folder, start)
    elif place.exists():  # again, since all of the waiting and reading lies between
        raise Refusal(f"--name {config.name}: another run has taken it meanwhile; choose another name")
    with _mlflow(run, manifest, console) as mlflow:

        def stopped() -> None:
            with suppress(OSError, KeyboardInterrupt):
                place.write_json(manifest | {"status": "stopped"})

        try:
            place.write_json(manifest)
            console.say(
                f"run {config.name}: {len(source.train):,} training, {len(source.validation):,} validation and "
                f"{len(source.test):,} test rows of {source.name} ({source.location}); {manifest['workers']}"
            )
            with _events(console, lambda entry: mlflow.tell(entry, console.say) if mlflow else None) as events:
                outcome, checkpoint = _train(run, allotment, loaded.images, start, held, events, console, stopped)
            return _finish(run, manifest, outcome, checkpoint, held.fence, mlflow, started, console)
        except KeyboardInterrupt:
            if not held.lost.is_set():
                stopped()
            raise _stopped(run) from None


def _finish(
    run: Run,
    manifest: dict[str, Any],
    outcome: Outcome,
    checkpoint: ray.train.Checkpoint,
    fence: Fence,
    mlflow: "MLflowRun | None",
    started: float,
    console: Console,
) -> dict[str, Any]:
    """Publish the model, the report and the last of the manifest; the fields of the job's last line."""
    fence.check()
    # A kill may have come between the last epoch and its publication.
    card = publish(run.folder, checkpoint, outcome.history, outcome.card)
    summary = {
        "run": run.folder.text,
        "model": (run.folder / "model").text,
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
    console.say(f"report: {(run.folder / REPORT).text}")
    return summary


def _allotted(run: Run, console: Console) -> resources.Allotment:
    """What the run takes of the cluster, once that is free."""
    config, source = run.config, run.source
    cluster, probe = resources.usable(resources.look(), config.use_gpu, config.wait_seconds, console.say)
    allotment = resources.allot(config, cluster)
    if cluster.can_grow and not allotment.use_gpu and config.use_gpu is None:
        console.say(f"training on CPUs, since the cluster has {cluster.describe()}; --use-gpu true waits for GPUs")
    if source.notice:
        console.say(source.notice)
    say_left_out(source.left_out, console.say)
    resources.wait_until_free(allotment.bundles(), config.wait_seconds, console.say)
    if allotment.use_gpu and probe is None:  # the GPUs have come while it waited
        resources.refuse_without_cuda(resources.probe_gpu(config.wait_seconds), config.use_gpu)
    first = source.parts[0]
    read = {"--data": first.location} if isinstance(first, ParquetPart) else {}
    refuse_unshared({"--storage-path": run.storage}, read, console.say)
    pipeline.quiet()
    return allotment


def _going_on(stored: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on: what it had come to stays until there is something new.

    Raises:
        Refusal: the data are others.
    """
    data, then = manifest["data"], stored["data"]
    if then["sha256"] != data["sha256"]:
        raise Refusal(
            f"--resume: the data are not those of the run (SHA-256 {data['sha256'][:12]}…, the run has {then['sha256'][:12]}… "
            f"from {then['location']}); name the same data, or start another run"
        )
    # What --data auto had led to is all that is named now, so only the first time it was said that it is not full MNIST.
    return stored | manifest | {"data": data | {"notice": data["notice"] or then["notice"]}}


def _steady_speed(history: list[dict[str, Any]]) -> float:
    """Training rows a second, without the first epoch, in which much happens for the first time."""
    steady = history[1:] or history
    return float(sum(line["rows_per_second"] * line["seconds"] for line in steady) / sum(line["seconds"] for line in steady))


@contextmanager
def _mlflow(run: Run, manifest: dict[str, Any], console: Console) -> Iterator["MLflowRun | None"]:
    """The run on the tracking server of `--mlflow`, which the manifest then names; it has failed if the block does."""
    told = _told_to_mlflow(run, manifest, console) if run.config.mlflow else None
    try:
        yield told
    except BaseException as error:
        if told:
            told.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _told_to_mlflow(run: Run, manifest: dict[str, Any], console: Console) -> "MLflowRun | None":
    from mnistsum_ray.mlflow import MLflowRun  # an extra

    config = run.config
    assert config.mlflow is not None
    assert config.name is not None
    stored = manifest.get("mlflow") if config.resume else None
    run_id = stored["run_id"] if stored and stored["uri"] == config.mlflow else None
    try:
        told = MLflowRun(config.mlflow, config.mlflow_experiment, config.name, run_id, manifest["config"])
    except Refusal as refusal:
        if not config.resume:
            raise
        console.say(f"{refusal}; going on without MLflow")
        return None
    manifest["mlflow"] = {"uri": config.mlflow, "run_id": told.run_id}
    return told


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves signals to this process: Ray Train would set a handler for Ctrl-C, for good, that ends it with exit code 0."""

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """End the workers, if there are any."""
        if self.controller is not None:
            with suppress(Exception):  # whatever it is, they end with this process
                ray.get(self.controller.abort.remote(), timeout=_ABORT_SECONDS)


def _train(
    run: Run,
    allotment: resources.Allotment,
    images: MaterializedDataset,
    start: Location | None,
    held: Hold,
    events: Queue,
    console: Console,
    stopped: Callable[[], None],
) -> tuple[Outcome, ray.train.Checkpoint]:
    """Run Ray Train to its end; `stopped` is called first where it is interrupted, since a cluster gives a job few seconds."""
    config, source = run.config, run.source
    first = ray.train.Checkpoint(start.path, start.filesystem) if start else None
    loop = LoopConfig(run.settings, source.train, source.validation, source.test, events, first, held.fence)
    fewest, most = allotment.workers
    # Without these two, a worker group that no longer fits is tried again for ever.
    attempts = config.max_failures + 1
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(max(60.0, config.wait_seconds / attempts))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a lost worker, or the end, is seen
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # some clouds give a node 30 s, and not two minutes
    failures = ray.train.FailureConfig(max_failures=config.max_failures, controller_failure_limit=config.max_failures)
    trainer = _Trainer(
        train_loop_per_worker,
        train_loop_config={"loop": loop},
        scaling_config=ray.train.ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=allotment.use_gpu,
            resources_per_worker=allotment.per_worker,
            # A CPU worker uses all cores of its node, whatever it reserves; GPUs talk fastest within one.
            placement_strategy="PACK" if allotment.use_gpu else "SPREAD",
            elastic_resize_monitor_interval_s=_GROWTH_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=run.storage.path,
            storage_filesystem=run.storage.filesystem,
            failure_config=failures,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[_Reporter(run.folder, events, held.fence)],
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
        raise RunFailed(
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
        raise RunFailed(answer["error"])
    last = result.checkpoint or first  # nothing was left to train
    assert last is not None, "a run of at least one epoch leaves a checkpoint"
    if result.checkpoint and start:
        start.filesystem.delete_dir(start.path)  # Ray Train, which keeps two, knows nothing of it
    return Outcome(**answer), last


class _Reporter(ray.train.UserCallback):
    """Runs beside the driver: publishes after every epoch, and says when workers are lost, which Ray Train does not."""

    def __init__(self, folder: Location, events: Queue, fence: Fence) -> None:
        self._folder, self._events, self._fence = folder, events, fence

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None) -> None:
        if checkpoint is not None:
            with checkpoint.as_directory() as local:
                history = json.loads((Path(local) / "trainer.json").read_text())["history"]
            self._fence.check()
            if history:  # one saved within the first epoch, since a node was about to go, holds no model yet
                publish(self._folder, checkpoint, history)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            text = str(getattr(error, "_base_exc", error)).strip().splitlines() or [type(error).__name__]
            self._events.put({"kind": "note", "text": f"worker {rank} failed: {text[0]} (full text in Ray's logs)"})


@contextmanager
def _events(console: Console, on_epoch: Callable[[dict[str, Any]], None]) -> Iterator[Queue]:
    """A queue whose events the console shows until the block ends; `on_epoch` gets the lines of history.jsonl."""
    # On this node, so that it is not lost with another.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    ended, failed = threading.Event(), threading.Event()

    def follow() -> None:
        silent = 0
        while True:
            try:
                event = queue.get(timeout=SILENCE_SECONDS)
            except ray.exceptions.RayError:  # a busy node does not answer for a moment, or it was ended before all was shown
                if ended.wait(1.0):
                    return
                continue
            except Empty:
                silent += SILENCE_SECONDS
                with suppress(ray.exceptions.RayError):  # a cluster that has ended; `fit` says so
                    console.say(f"no word from the workers for {silent} s: {resources.describe_wait()}")
                continue
            if event is None or failed.is_set():
                return
            silent = 0
            console.show(event)
            if event["kind"] == "epoch":
                on_epoch({key: value for key, value in event.items() if key != "kind"})

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield queue
    except BaseException:
        failed.set()  # what is still to be shown is not waited for
        raise
    finally:
        queue.actor.put.remote(None)
        thread.join(timeout=10)
        ended.set()
        queue.shutdown(force=True)
        thread.join(timeout=5)  # it must not ask for events of a cluster that this process has left


def _workers_text(allotment: resources.Allotment) -> str:
    fewest, most = allotment.workers
    number = str(fewest) if fewest == most else f"{fewest} to {most}"
    return f"{number} {'GPU' if allotment.use_gpu else 'CPU'} worker{'s' * (most != 1)}"
