"""Driver of a training run: wait for workers, read the rows, run Ray Train, publish the model."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import check_shared_storage
from mnistsum_ray.cluster.resources import inspect_cluster, reserve, shortage
from mnistsum_ray.cluster.workarounds import detached_data_actors, make_interruptible
from mnistsum_ray.data.inputs import report_skipped
from mnistsum_ray.data.order import TrainingOrder
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    RunInterrupted,
    TryAgainError,
    counted,
    one_line,
    root_cause,
)
from mnistsum_ray.model.folder import load_model
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.metrics import JobMetrics
from mnistsum_ray.reporting.results import TrainResult
from mnistsum_ray.storage.lock import LOCK_NAME, FolderLock, folder_lock
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.analysis import FinishedModel, finish_model
from mnistsum_ray.training.artifacts import (
    build_manifest,
    check_data,
    log_to_mlflow,
    write_config,
    write_history,
    write_results,
)
from mnistsum_ray.training.checkpoint import CHECKPOINTS, newest_checkpoint, next_attempt
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.pipeline import StepsInOrder, TrainingData, epochs_from, load_blocks
from mnistsum_ray.training.preflight import MANIFEST, TrainingRun, read_manifest
from mnistsum_ray.training.resources import check_space, choose_threads, worker_request
from mnistsum_ray.training.worker import FailureLines, event_queue

_RESIZE_SECONDS: Final = 30.0
"""Seconds between checks whether an elastic run can have more workers; growing goes on from the last checkpoint."""

_STARTS: Final = 4
"""Starts of a group of workers that Ray tries, which share `--wait-seconds`: a node may be lost meanwhile."""

_MIN_WAIT_SECONDS: Final = 60.0
"""Shortest wait for the first word of workers: a cluster takes a while to notice what it has lost."""


def fit(run: TrainingRun, console: Console, callbacks: Sequence[ray.train.UserCallback] = ()) -> TrainResult:
    """Train on the cluster that this process is connected to.

    Raises:
        RequestError: the cluster is too small, or a row of the data cannot be used.
        TryAgainError: the workers are not free in time, or another run writes there.
        RunError: the loss became infinite, workers or callbacks failed more often than
            `--max-failures`, or the storage cannot be written.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        with folder_lock(run.folder, "--name", console.say) as lock:
            return _Driver(run, lock, console, callbacks).fit()
    except OSError as error:
        raise RunError(f"--storage-path {one_line(error)}; {run.how_to_resume()}") from error
    except ray.exceptions.RayError as error:  # of the driver's own tasks
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {run.how_to_resume()}") from error


class _Driver:
    """A run that holds its folder. Errors are those of `fit`."""

    def __init__(
        self,
        run: TrainingRun,
        lock: FolderLock,
        console: Console,
        callbacks: Sequence[ray.train.UserCallback],
    ) -> None:
        self.run = run
        self.lock = lock
        self.console = console
        self.callbacks = callbacks
        self.manifest: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.start: Location | None = None
        """Checkpoint that the run goes on from."""
        self.epochs_done = 0
        self.weights: dict[str, Any] | None = None
        self.waiting_since: float | None = None
        """When workers were wanted that have not reported yet."""
        self.late = False
        self.started = time.monotonic()

    def fit(self) -> TrainResult:
        """Train and publish. The manifest says how a run ends that does not finish."""
        self._prepare()
        try:
            file = self.run.folder / MANIFEST
            write = file.write if self.run.config.resume else file.create
            write(self.manifest)
            with event_queue(self.console, self._on_event) as events:
                if self.epochs_done < self.run.hyperparameters.epochs:
                    self._train(events)
                finished = self._finish(events)
            return self._publish(finished)
        except KeyboardInterrupt:
            self._mark("stopped")
            raise RunInterrupted(self.run.how_to_resume()) from None
        except BaseException:
            self._mark("failed")
            raise

    def _prepare(self) -> None:
        """Wait for the workers, and read the rows."""
        run, say = self.run, self.console.say
        source, parameters = run.source, run.hyperparameters
        self._find_start()
        self.plan = reserve(worker_request(run.config, parameters.batch_size), say)
        if source.notice:
            say(source.notice)
        report_skipped(source.skipped, say)
        check_shared_storage({"--storage-path": self.run.folder / LOCK_NAME, **run.input_file()}, say)
        say(check_space(source.rows))
        read = Progress(self.console.progress, "rows read", source.rows)
        source, blocks, sha256 = load_blocks(source, skip_bad_rows=run.config.skip_bad_rows, on_progress=read)
        if source.bad.total:
            say(f"left out: {source.bad.total:,} of {counted(source.rows, 'row')}: {source.bad.describe()}")
        check_data(run, sha256)
        order = TrainingOrder(source.train, blocks.bounds, parameters.batch_size, parameters.seed)
        self.train_rows = len(source.train)
        self.data = ray.put(TrainingData(blocks, order, source.validation, source.test))
        self.threads = choose_threads(run, self.plan, inspect_cluster())
        new = build_manifest(run, source, sha256, self.plan) | {"threads": self.threads}
        # Results of a run that is resumed stay until there are new ones.
        self.manifest = self.manifest | new
        of = source.name if source.name == "sample" else f"{source.name} ({source.location})"
        say(
            f"run {run.config.name}: {len(source.train):,} training, {len(source.validation):,} validation, "
            f"{len(source.test):,} test rows of {of}; {self.plan.describe()}"
        )

    def _find_start(self) -> None:
        """Find the checkpoint or the model to start from: what is wrong there is said before the wait."""
        run, say = self.run, self.console.say
        found = None
        if run.config.resume:
            self.manifest = read_manifest(run.folder)
            found = newest_checkpoint(run.folder, say)
            if found is None and self.manifest.get("status") == "finished":
                raise RequestError(
                    f"--resume: run {run.config.name} is finished, and no checkpoint is left to resume from; its files stay "
                    "as they are; start another run"
                )
            if found is None:
                say("no checkpoint can be used, so the run starts from the beginning")
        elif (run.folder / MANIFEST).exists():  # checked again, now that no other run can write there
            raise RequestError(f"--name {run.config.name}: another run has taken it meanwhile; choose another name")
        if found:
            self.start, state = found
            self.epochs_done, self.history = state.epochs_done, state.history
        elif run.init_from is not None:
            network, description = load_model(run.init_from)
            self.weights = {name: value.numpy() for name, value in network.state_dict().items()}
            self.manifest["init_from"] = {"model": run.init_from.display, "sha256": description["sha256"]}

    def _mark(self, status: str) -> None:
        """Write the status of a run that is not finished."""
        if self.manifest["status"] == "finished":
            return
        with suppress(OSError, RunError, KeyboardInterrupt):
            self.lock.check()
            (self.run.folder / MANIFEST).write(self.manifest | {"status": status})

    def _on_event(self, event: dict[str, Any]) -> None:
        """Do what an event of the workers asks for, besides its line on the console, see `Console.show`."""
        if event["kind"] == "precision":
            self.waiting_since = None
            # Only now that the workers have chosen it: config.yaml says all.
            write_config(self.run, self.plan, self.threads, event["precision"])
        elif event["kind"] == "failure":
            self.waiting_since = time.monotonic()
        elif event["kind"] == "silence" and self.waiting_since is not None:
            waited = time.monotonic() - self.waiting_since
            if waited > max(self.run.config.wait_seconds, _MIN_WAIT_SECONDS):
                self.late = True
                self.abort()
        elif event["kind"] == "progress":
            self.metrics.count(rows=(event["epoch"] - 1) * event["of_rows"] + event["rows"])
            self.metrics.set(rows_per_second=event["rows_per_second"], epoch=event["epoch"], loss=event["loss"])
        elif event["kind"] == "epoch":
            line = {key: value for key, value in event.items() if key != "kind"}
            self.history = [earlier for earlier in self.history if earlier["epoch"] < line["epoch"]] + [line]
            write_history(self.run.folder, self.history)  # after an error it is written with the next epoch

    def _train(self, events: Queue) -> None:
        """Train the epochs that are left with Ray Train, which starts workers again that fail."""
        run, parameters = self.run, self.run.hyperparameters
        self.metrics = JobMetrics("train", run.folder.display, self.epochs_done * self.train_rows)
        loop = LoopConfig(parameters, self.threads, self.data, events, self.start, self.weights)
        low, high = self.plan.worker_range
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=self.plan.use_gpu,
                resources_per_worker=self.plan.per_worker,
                # A CPU worker uses all cores of its node, so one a node; GPUs exchange gradients fastest within a node.
                placement_strategy="PACK" if self.plan.use_gpu else "SPREAD",
                elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=next_attempt(run.folder),
                storage_path=run.ray_storage(CHECKPOINTS),
                callbacks=[*self.callbacks, FailureLines(events)],
                failure_config=ray.train.FailureConfig(
                    max_failures=run.config.max_failures,
                    max_preemption_failures=-1,
                    controller_failure_limit=_STARTS - 1,
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
            datasets={
                f"from epoch {epoch}": epochs_from(epoch, parameters.epochs)
                for epoch in range(self.epochs_done, parameters.epochs)
            },
            dataset_config=StepsInOrder(
                self.data, parameters.epochs, parameters.distortion, readers=2 if self.plan.use_gpu else 1
            ),
        )
        if not started_cluster():
            detached_data_actors()
        self.abort = make_interruptible(trainer)
        self.waiting_since = time.monotonic()
        try:
            with default_environment(_train_environment(run.config.wait_seconds)):
                failure = trainer.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            raise self._explained(error) from error
        except KeyboardInterrupt:
            self._mark("stopped")  # first, since a cluster gives a stopped job only a few seconds
            self.abort()
            raise
        if failure:
            raise RunError(failure)

    def _explained(self, error: Exception) -> RunError:
        """Why Ray Train has given up, in one line."""
        resume = self.run.how_to_resume()
        cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
        if self.late or type(cause).__name__ == "WorkerGroupStartupTimeoutError":
            return TryAgainError(f"{shortage(self.plan, time.monotonic() - (self.waiting_since or 0))}; {resume}")
        if isinstance(error, ray.train.WorkerGroupError):
            failures = counted(self.run.config.max_failures + 1, "failure")
            return RunError(f"gave up after {failures} of workers, see above; {resume}")
        self.console.say_lines(str(error))
        return RunError(f"{root_cause(cause)}; {resume}")

    def _finish(self, events: Queue) -> FinishedModel:
        """Fine-tune and analyse the last epoch's model, on one worker's resources."""
        found = newest_checkpoint(self.run.folder, self.console.say)
        if found is None or found[1].epochs_done < self.run.hyperparameters.epochs:
            raise RunError(f"the checkpoint of the last epoch cannot be used; {self.run.how_to_resume()}")
        need = self.plan.per_worker
        # "DEFAULT": in a trial of Ray Tune the task would have to fit into the trial's own resources.
        task = ray.remote(num_cpus=need.get("CPU", 0), num_gpus=need.get("GPU", 0), scheduling_strategy="DEFAULT")(finish_model)
        finished: FinishedModel = ray.get(task.remote(self.run.hyperparameters, self.data, found[0], self.threads, events))
        return finished

    def _publish(self, finished: FinishedModel) -> TrainResult:
        """Write the model, the report and, last, the manifest."""
        run, say = self.run, self.console.say
        self.lock.check()
        write_config(run, self.plan, self.threads, finished.manifest["precision"])
        seconds = time.monotonic() - self.started
        summary, manifest, files = write_results(run, self.manifest, finished, seconds, say)
        self.lock.check()
        self.manifest = manifest  # first: a signal does not make a finished run a stopped one
        (run.folder / MANIFEST).write(manifest)
        if run.config.mlflow:
            log_to_mlflow(run, manifest, finished, files, say)
        return summary


def _train_environment(wait_seconds: float) -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    joined = "0" if started_cluster() else "1"
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(max(wait_seconds / _STARTS, 1.0)),
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away. The process that asks takes a second to start.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": joined,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # Attempts, workers and their logs, at /api/train/v2/runs/v1 of the dashboard. They are kept by a process of 250 MiB that
        # stays on the head; the first run of a cluster starts it, in 3 s. A cluster of this process has no dashboard.
        "RAY_TRAIN_ENABLE_STATE_TRACKING": joined,
    }
