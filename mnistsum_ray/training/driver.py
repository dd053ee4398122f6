"""Driver of a training run: reserve resources, place the rows, run Ray Train, publish the result."""

import shlex
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from typing import Any, Final

import ray.exceptions
import ray.train
import torch
from ray.util.queue import Queue

from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import check_shared_storage, lost_nodes
from mnistsum_ray.cluster.resources import WorkerPlan, inspect_cluster, reserve, wait_until_free
from mnistsum_ray.cluster.stop import defer_signals
from mnistsum_ray.cluster.workarounds import detached_data_actors
from mnistsum_ray.data.inputs import report_skipped
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import (
    RequestError,
    RunError,
    RunInterrupted,
    TryAgainError,
    counted,
    one_line,
    root_cause,
    shell_command,
)
from mnistsum_ray.model.folder import save_model
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.console import Console, Progress, accuracies
from mnistsum_ray.reporting.metrics import JobMetrics
from mnistsum_ray.reporting.report import REPORT, epoch_seconds
from mnistsum_ray.reporting.results import HeldOutMetrics, SplitRows, TrainResult
from mnistsum_ray.storage.lock import LOCK_NAME, FolderLock, folder_lock
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training.analysis import TrainingResult
from mnistsum_ray.training.artifacts import (
    build_manifest,
    check_data,
    read_history,
    write_config,
    write_history,
    write_report,
)
from mnistsum_ray.training.checkpoint import delete_other_checkpoints, latest_valid_checkpoint
from mnistsum_ray.training.fetch import load_rows
from mnistsum_ray.training.loop import LoopConfig, train_loop_per_worker
from mnistsum_ray.training.preflight import TrainingRun, read_manifest
from mnistsum_ray.training.ray_hooks import InterruptibleTrainer, placement_groups, remove_placement_groups
from mnistsum_ray.training.resources import check_memory, choose_threads, worker_request
from mnistsum_ray.training.worker import event_queue

_MANIFEST: Final = "manifest.json"

_RESIZE_SECONDS: Final = 30.0
"""Seconds between checks whether an elastic run can have more workers; growing goes on from the last checkpoint."""

_MIN_WAIT_SECONDS: Final = 60.0
"""Shortest wait for the resources of workers that go on: a cluster takes a while to notice what it has lost."""

_EVENT_SECONDS: Final = 1.0
"""Time in which a failure that a worker has reported arrives here."""


def fit(run: TrainingRun, console: Console, callbacks: Sequence[ray.train.UserCallback] = ()) -> TrainResult:
    """Train on the cluster that this process is connected to.

    Raises:
        RequestError: the cluster is too small, or a row of the data cannot be used.
        TryAgainError: the workers are not free in time, or another run writes there.
        RunError: the loss became infinite, workers or callbacks failed more often than `--max-failures`, or the storage
            cannot be written.
        RunInterrupted: SIGINT, SIGTERM or SIGHUP arrived.
    """
    try:
        with folder_lock(run.folder, "--name", console.say) as lock:
            plan = reserve(worker_request(run.config, run.hyperparameters.batch_size), console.say)
            if run.source.notice:
                console.say(run.source.notice)
            report_skipped(run.source.skipped, console.say)
            seen = {"--storage-path": run.folder / LOCK_NAME}
            if run.source.files is not None:
                seen["--data"] = run.source.files.location(0)
            check_shared_storage(seen, console.say)
            return _Driver(run, plan, lock, console, callbacks).fit()
    except OSError as error:
        raise RunError(f"--storage-path {one_line(error)}; {run.how_to_resume()}") from error
    except ray.exceptions.RayError as error:  # of the driver; failures of workers are handled below
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {run.how_to_resume()}") from error


class _Driver:
    """A run that holds its folder, with its rows placed and its manifest made. Errors are those of `fit`."""

    def __init__(
        self,
        run: TrainingRun,
        plan: WorkerPlan,
        lock: FolderLock,
        console: Console,
        callbacks: Sequence[ray.train.UserCallback],
    ) -> None:
        self.run = run
        self.plan = plan
        self.lock = lock
        self.console = console
        self.callbacks = callbacks
        self.history: list[dict[str, Any]] = []
        self.started, source = time.monotonic(), run.source
        cluster = inspect_cluster()
        memory = check_memory(run, cluster)
        read, skip = Progress(console.progress, "rows read", source.rows), run.config.skip_bad_rows
        self.rows = load_rows(source, streamed=run.shuffle.streamed, skip_bad_rows=skip, on_progress=read)
        self.run = run = replace(run, source=self.rows.source)
        if bad := run.source.bad.total:
            console.say(f"left out: {bad:,} of {counted(source.rows, 'row')}: {run.source.bad.describe()}")
        console.say(memory)  # now that the rows have been read: a refusal is one line
        threads = choose_threads(run, plan, cluster)
        check_data(run, self.rows.sha256)
        self.manifest = build_manifest(run, self.rows.sha256, plan) | {"threads": threads}
        self.start: Location | None = None
        self.failures = 0
        """Failures since the last checkpoint."""
        self.failed = threading.Event()
        self.failure = ""
        """What a worker has failed with that another attempt would meet again."""
        self.lost = lost_nodes()
        self.groups = placement_groups()
        """Placement groups of a caller of `fit`."""
        if run.config.resume:
            self._resume()
        elif (run.folder / _MANIFEST).exists():  # checked again, now that no other run can write there
            raise RequestError(f"--name {run.config.name}: another run has taken it meanwhile; choose another name")

    def _resume(self) -> None:
        """Take over the manifest and the history of the run that is resumed, and find the checkpoint to start from."""
        run, say = self.run, self.console.say
        stored, data = read_manifest(run.folder), self.manifest["data"]
        # The stored config names the data that `--data auto` found, so only the first manifest says that it is not full MNIST.
        data["notice"] = data["notice"] or stored["data"]["notice"]
        self.start = latest_valid_checkpoint(run.folder, say)
        if self.start is None and stored.get("status") == "finished":
            raise RequestError(
                f"--resume: run {run.config.name} is finished, and no checkpoint is left to resume from; its files stay as "
                "they are; start another run"
            )
        if self.start is None:
            say("no checkpoint can be used, so the run starts from the beginning")
        delete_other_checkpoints(run.folder, self.start)
        self.manifest = stored | self.manifest  # results of the stored one stay until there are new ones
        self.history = read_history(run.folder)

    def fit(self) -> TrainResult:
        """Train and publish. The manifest says how a run ends that does not finish."""
        run, source = self.run, self.run.source
        try:
            file = run.folder / _MANIFEST
            write = file.write if run.config.resume else file.create
            write(self.manifest)
            of = source.name if source.name == "sample" else f"{source.name} ({source.location})"
            self.console.say(
                f"run {run.config.name}: {len(source.train):,} training, {len(source.validation):,} validation, "
                f"{len(source.test):,} test rows of {of}; {self.manifest['workers']}"
            )
            rows = len(self.history) * len(source.train)
            self.metrics = JobMetrics("train", run.folder.display, rows)
            with event_queue(self.console, self._on_event) as events:
                result = self._train(events)
            return self._publish(result)
        except KeyboardInterrupt:
            self._mark("stopped")
            raise RunInterrupted(run.how_to_resume()) from None
        except BaseException:
            self._mark("failed")
            raise

    def _mark(self, status: str) -> None:
        """Write the status of a run that is not finished."""
        if self.manifest["status"] == "finished":
            return
        with suppress(OSError, RunError, KeyboardInterrupt):
            self.lock.check()
            (self.run.folder / _MANIFEST).write(self.manifest | {"status": status})

    def _on_event(self, event: dict[str, Any]) -> None:
        """Do what an event of the training loop asks for, besides its line on the console, see `Console.show`."""
        if event["kind"] in ("precision", "epoch") and not self._holds_lock():
            return
        if event["kind"] == "failure":
            self.failure = self.failure or event["text"]
            self.failed.set()
        elif event["kind"] == "precision":
            # Only now that the workers have chosen it: config.yaml says all.
            write_config(self.run, self.plan, self.manifest["threads"], event["precision"])
        elif event["kind"] == "progress":
            self.metrics.count(rows=(event["epoch"] - 1) * event["of_rows"] + event["rows"])
            self.metrics.set(rows_per_second=event["rows_per_second"], epoch=event["epoch"], loss=event["loss"])
        elif event["kind"] == "epoch":
            line = {key: value for key, value in event.items() if key != "kind"}
            self.history[:] = [earlier for earlier in self.history if earlier["epoch"] < line["epoch"]] + [line]
            write_history(self.run.folder, self.history)  # after an error it is written with the next epoch

    def _holds_lock(self) -> bool:
        """Whether no other run has taken the folder; if one has, the workers end, and `_train` says why."""
        try:
            self.lock.check()
        except RunError:
            self.trainer.abort()
            return False
        return True

    def _new_trainer(self, events: Queue) -> InterruptibleTrainer:
        run, config = self.run, self.run.config
        min_workers, max_workers = self.plan.worker_range
        loop = LoopConfig(
            run.hyperparameters,
            self.manifest["threads"],
            self.rows.data,
            run.shuffle,
            run.source.validation,
            run.source.test,
            events=events,
            start=self.start,
        )
        return InterruptibleTrainer(
            train_loop_per_worker,
            train_loop_config={"loop": loop},
            scaling_config=ray.train.ScalingConfig(
                num_workers=min_workers if min_workers == max_workers else self.plan.worker_range,
                use_gpu=self.plan.use_gpu,
                resources_per_worker=self.plan.per_worker,
                # A CPU worker uses all cores of its node, so one a node; GPUs exchange gradients fastest within a node.
                placement_strategy="PACK" if self.plan.use_gpu else "SPREAD",
                elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=config.name,
                storage_path=run.ray_storage,
                callbacks=[*self.callbacks],
                failure_config=ray.train.FailureConfig(controller_failure_limit=0, max_preemption_failures=0),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
            # No datasets: Ray Train would split them, and drop up to one row a worker. Each worker makes its own, see rows.py.
        )

    def _train(self, events: Queue) -> TrainingResult:
        """Run Ray Train, and after a failure again from the newest checkpoint; the result of rank 0.

        Ray Train's own retries count the failures of the whole run, lost nodes included, and it does not retry where a node is
        lost while the workers start.
        """
        if not started_cluster():
            detached_data_actors()
        while True:
            self.trainer = self._new_trainer(events)
            try:
                with default_environment(_train_environment()):
                    result: TrainingResult = self.trainer.fit().return_value
                return result
            except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
                self.lock.check()  # if another run has taken the folder, that is the cause
                if self.failed.wait(_EVENT_SECONDS):
                    raise RunError(self.failure) from error
                self._recover(error)
            except KeyboardInterrupt:
                self._mark("stopped")  # first, since a cluster gives a stopped job only a few seconds
                self.trainer.abort()
                self.lock.check()
                raise

    def _recover(self, error: Exception) -> None:
        """Say why the workers have failed, make way for others that go on from the newest checkpoint, and wait until they fit."""
        run, say = self.run, self.console.say
        lost = lost_nodes(error.preemption_info.preempted_node_ids if isinstance(error, ray.train.PreemptionError) else ())
        causes = [f"the node {address} was lost" for node, address in lost.items() if node not in self.lost]
        self.lost = lost
        if isinstance(error, ray.train.WorkerGroupError) and not causes:  # else the workers that are left blame each other
            causes = [f"worker {rank} failed: {root_cause(cause)}" for rank, cause in error.worker_failures.items()]
        for cause in causes or [root_cause(error)]:
            say(f"{cause} (full text in Ray's logs)")
        newest = latest_valid_checkpoint(run.folder, say)
        progressed = newest is not None and (self.start is None or newest.name > self.start.name)
        self.failures = 1 if progressed else self.failures + 1
        if self.failures > run.config.max_failures:
            self.console.say_lines(str(error))
            problem = "the workers failed or could not be started, see above"
            raise RunError(f"gave up after {counted(self.failures, 'failure')}: {problem}; {run.how_to_resume()}") from error
        self.start = newest
        delete_other_checkpoints(run.folder, newest)
        remove_placement_groups(but=self.groups)
        try:
            wait_until_free(self.plan, max(_MIN_WAIT_SECONDS, run.config.wait_seconds), say)
        except TryAgainError as problem:
            raise TryAgainError(f"{problem}; {run.how_to_resume()}") from None

    def _publish(self, result: TrainingResult) -> TrainResult:
        """Publish the model, write the report, complete the manifest."""
        run, manifest, say = self.run, self.manifest.copy(), self.console.say
        self.lock.check()
        write_config(run, self.plan, manifest["threads"], result.manifest["precision"])
        card = result.description
        weights = {name: torch.tensor(value) for name, value in result.weights.items()}
        save_model(run.folder / "model", weights, card)
        write_history(run.folder, result.history)
        steady = result.history[1:] or result.history  # the first epoch includes one-time work such as loading kernels
        speed = fmean((line["rows_per_second"] for line in steady), (line["seconds"] for line in steady))
        summary = TrainResult(
            run=run.folder.display,
            model=(run.folder / "model").display,
            parameters=card["parameters"],
            data=SplitRows.of(manifest["data"]),
            test=HeldOutMetrics.of(card["test"]),
            images_per_second=round(speed, 1),
            seconds=round(time.monotonic() - self.started, 1),
        )
        seconds = round(sum(map(epoch_seconds, result.history)), 1)
        manifest |= {"status": "finished", "metrics": summary.line(), **result.manifest, "training_seconds": seconds}
        files = write_report(run, manifest, card, result, say)
        self.lock.check()
        with defer_signals():  # a run that is finished is not stopped
            (run.folder / _MANIFEST).write(manifest)
            self.manifest = manifest
        if run.config.mlflow:
            try:
                from mnistsum_ray.reporting.mlflow import log_run  # needs the extra `mlflow`

                run_id = log_run(manifest, result.history, card, run.folder, files)
                say(f"MLflow: run {run_id} at {run.config.mlflow}")
            except Exception as error:  # from the network to a missing client of the server's storage
                say(f"--mlflow {run.config.mlflow}: {one_line(error)}; the run is complete, and --resume logs it again")
        say(f"test: {accuracies(card['test'])} ({counted(card['test']['rows'], 'row')}, all {NUMBERS} numbers)")
        say(f"report: {(run.folder / REPORT).display}")
        say(f"score with it: {shell_command('score')} --model {shlex.quote(run.folder.display)} --input PAIRS --output SCORED")
        return summary


def _train_environment() -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    joined = "0" if started_cluster() else "1"
    return {
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away. The process that asks takes a second to start.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": joined,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # Attempts, workers and their logs, at /api/train/v2/runs/v1 of the dashboard. They are kept by a process of 250 MiB that
        # stays on the head; the first run of a cluster starts it, in 3 s. A cluster of this process has no dashboard.
        "RAY_TRAIN_ENABLE_STATE_TRACKING": joined,
    }
