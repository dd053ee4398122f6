"""Driver of a training run: wait for workers, read the rows, run Ray Train, publish the model."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from mnistsum_ray.cluster import resources
from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import check_shared_storage, on_node, usable_nodes
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
from mnistsum_ray.model.folder import Weights, load_model
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.results import TrainResult
from mnistsum_ray.storage.lock import LOCK_NAME, FolderLock, folder_lock
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.analysis import FinishedModel, finish_model
from mnistsum_ray.training.checkpoint import CHECKPOINTS, newest_checkpoint
from mnistsum_ray.training.loop import FailureLines, LoopConfig, train_loop_per_worker
from mnistsum_ray.training.pipeline import StepsInOrder, epochs_from
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.record import RunRecord
from mnistsum_ray.training.rows import TrainingData, check_space, load_blocks

_ROWS_PER_GPU: Final = 256
"""Rows of a step below which another GPU is of no use: the kernels of so small a network take as
long for 32 rows as for 256."""

_MIN_WAIT_SECONDS: Final = 60.0
"""Shortest wait for workers to report: a cluster takes a while to notice what it has lost."""


def fit(
    run: TrainingRun, console: Console, callbacks: Sequence[ray.train.UserCallback] = ()
) -> TrainResult:
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
    except ray.exceptions.RayError as error:  # of the driver's own tasks; some are OSErrors too
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {run.how_to_resume()}") from error
    except OSError as error:
        raise RunError(f"--storage-path {one_line(error)}; {run.how_to_resume()}") from error


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
        self.console = console
        self.callbacks = callbacks
        self.record = RunRecord(run, lock, console.say)
        self.checkpoint: Location | None = None
        """Where a run that is resumed goes on."""
        self.weights: Weights | None = None
        """Those of `--init-from`."""
        self.init_from: dict[str, str] | None = None
        self.workers_wanted_at: float | None = None
        """When workers were wanted that have not reported yet."""
        self.gave_up_after = 0.0
        """Seconds that the driver has waited for them in vain; 0: it has not given up."""

    def fit(self) -> TrainResult:
        """Train and publish. The manifest says how a run ends that does not finish."""
        self._find_start()
        try:
            self._prepare()
            with self._events() as events:
                if len(self.record.history) < self.run.hyperparameters.epochs:
                    self._train(events)
                finished = self._finish(events)
            return self.record.publish(finished)
        except KeyboardInterrupt:
            if not self.record.begun:
                raise
            self.record.mark("stopped")
            raise RunInterrupted(self.run.how_to_resume()) from None
        except BaseException:
            self.record.mark("failed")
            raise

    def _train(self, events: Queue) -> None:
        """Train the epochs that are left with Ray Train, which starts workers again that fail."""
        run, parameters, use_gpu = self.run, self.run.hyperparameters, self.plan.use_gpu
        low, high = self.plan.worker_range
        loop = LoopConfig(
            parameters, self.threads, self.data, events, self.checkpoint, self.weights
        )
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"loop": loop},
            # Read is only that of the epoch which a worker's checkpoint names.
            datasets={
                f"from epoch {epoch}": epochs_from(epoch, parameters.epochs)
                for epoch in range(len(self.record.history), parameters.epochs)
            },
            dataset_config=StepsInOrder(
                self.data, parameters.epochs, parameters.distortion, readers=2 if use_gpu else 1
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=use_gpu,
                resources_per_worker=self.plan.per_worker,
                # A CPU worker uses all cores of its node, so one a node; GPUs exchange gradients
                # fastest within a node.
                placement_strategy="PACK" if use_gpu else "SPREAD",
                # How often an elastic run looks for more workers; it grows from its checkpoint.
                elastic_resize_monitor_interval_s=30.0,
            ),
            run_config=ray.train.RunConfig(
                name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}",  # see CHECKPOINTS
                storage_path=run.ray_storage(CHECKPOINTS),
                callbacks=[*self.callbacks, FailureLines(events)],
                failure_config=ray.train.FailureConfig(
                    max_failures=run.config.max_failures, max_preemption_failures=-1
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        if not started_cluster():
            detached_data_actors()
        self.abort = make_interruptible(trainer)
        self.workers_wanted_at = time.monotonic()
        try:
            with default_environment(_train_environment()):
                failure = trainer.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            raise self._explained(error) from error
        except KeyboardInterrupt:
            # First, since a cluster gives a stopped job only a few seconds.
            self.record.mark("stopped")
            self.abort()
            raise
        if failure:
            raise RunError(failure)

    def _explained(self, error: Exception) -> RunError:
        """Why Ray Train has given up, in one line."""
        resume = self.run.how_to_resume()
        if self.gave_up_after:
            return TryAgainError(f"{self.plan.shortage(self.gave_up_after)}; {resume}")
        if isinstance(error, ray.train.WorkerGroupError):
            failures = counted(self.run.config.max_failures + 1, "failure")
            return RunError(f"gave up after {failures} of workers, see above; {resume}")
        self.console.say_lines(str(error))
        cause = getattr(error, "controller_failure", error)
        return RunError(f"{root_cause(cause)}; {resume}")

    def _find_start(self) -> None:
        """Find the checkpoint, or else the weights, to start from.

        Called before the wait for workers, so that a wrong one is refused at once.
        """
        run, say = self.run, self.console.say
        if run.config.resume:
            found = newest_checkpoint(run.folder, say)
            if found is not None:
                self.checkpoint, state = found
                self.record.history = state.history
                return
            if (run.stored or {}).get("status") == "finished":
                raise RequestError(
                    f"--resume: run {run.config.name} is finished, and no checkpoint is left to "
                    "resume from; its files stay as they are; start another run"
                )
            say("no checkpoint can be used, so the run starts from the beginning")
        if run.config.init_from is not None:
            network, description = load_model(locate(run.config.init_from, "--init-from"))
            self.weights = network.state_dict()
            self.init_from = {"model": run.config.init_from, "sha256": description["sha256"]}

    def _prepare(self) -> None:
        """Wait for what the workers need, and read the rows while it is held."""
        config = self.run.config
        gpus = max(1, self.run.hyperparameters.batch_size // _ROWS_PER_GPU)
        with resources.reserve(config, self.console.say, gpus) as self.plan:
            self.threads = choose_threads(self.run, self.plan)
            self._read_rows()

    def _read_rows(self) -> None:
        run, say = self.run, self.console.say
        source, parameters = run.source, run.hyperparameters
        if source.notice:
            say(source.notice)
        report_skipped(source.skipped, say)
        files = {"--storage-path": run.folder / LOCK_NAME, **run.first_file()}
        check_shared_storage(files, say)
        say(check_space(source.rows))
        source, blocks, sha256 = load_blocks(
            source,
            skip_bad_rows=run.config.skip_bad_rows,
            on_progress=Progress(self.console.progress, "rows read", source.rows),
        )
        if source.bad.total:
            left_out = f"{source.bad.total:,} of {counted(source.rows, 'row')}"
            say(f"left out: {left_out}: {source.bad.describe()}")
        self.record.begin(source, sha256, self.plan, self.threads, self.init_from)
        order = TrainingOrder(source.train, blocks.bounds, parameters.batch_size, parameters.seed)
        self.data = ray.put(TrainingData(blocks, order, source.validation, source.test))
        train, validation, test = map(len, (source.train, source.validation, source.test))
        self.metrics = JobMetrics("train", run.folder.display, len(self.record.history) * train)
        of = source.name if source.name == "sample" else f"{source.name} ({source.location})"
        counts = f"{train:,} training, {validation:,} validation, {test:,} test rows of {of}"
        say(f"run {run.config.name}: {counts}; {self.plan.describe()}")

    @contextmanager
    def _events(self) -> Iterator[Queue]:
        """A queue for the events of the workers, which a thread follows."""
        queue = Queue(actor_options=on_node())  # so that it is not lost with another node
        ended = threading.Event()

        def follow() -> None:
            with self.console.waiting_for("the workers", resources.explain_worker_silence):
                while True:
                    try:
                        event = queue.get(timeout=5.0)
                    except Empty:
                        self._end_late_workers()
                        continue
                    except ray.exceptions.RayError:  # the node is too busy, or the queue has ended
                        if ended.wait(1.0):
                            return
                        continue
                    if event is None:
                        return
                    self._follow(event)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield queue
            queue.put(None)  # the last event: the thread ends once those before it are shown
            thread.join(timeout=10)
        finally:  # after an error, events that are still queued are dropped
            ended.set()
            queue.shutdown(force=True)
            thread.join(timeout=5)  # it must not call Ray after this process has left the cluster

    def _end_late_workers(self) -> None:
        """End the workers if they have not come in time: Ray Train would wait for ever."""
        if self.workers_wanted_at is None:
            return
        waited = time.monotonic() - self.workers_wanted_at
        if waited > max(self.run.config.wait_seconds, _MIN_WAIT_SECONDS):
            self.gave_up_after, self.workers_wanted_at = waited, None
            self.abort()

    def _follow(self, event: dict[str, Any]) -> None:
        """Show an event of the workers, and do what it asks for besides."""
        try:
            self.console.show(event)
            if event["kind"] == "begin":
                self.workers_wanted_at = None
            elif event["kind"] == "failure":
                self.workers_wanted_at = time.monotonic()
            elif event["kind"] == "progress":
                rows = (event["epoch"] - 1) * event["of_rows"] + event["rows"]
                self.metrics.count(rows=rows)
                names = ("rows_per_second", "epoch", "loss")
                self.metrics.set(**{name: event[name] for name in names})
            elif event["kind"] == "epoch":
                line = {key: value for key, value in event.items() if key != "kind"}
                self.record.add_epoch(line)  # after an error it is written with the next one
        except Exception as error:
            text = f"an event of the workers is left out ({event['kind']}): {one_line(error)}"
            self.console.say(text)

    def _finish(self, events: Queue) -> FinishedModel:
        """Fine-tune and analyse the last epoch's model, on one worker's resources."""
        found = newest_checkpoint(self.run.folder, self.console.say)
        if found is None or found[1].epochs_done < self.run.hyperparameters.epochs:
            problem = "the checkpoint of the last epoch cannot be used"
            raise RunError(f"{problem}; {self.run.how_to_resume()}")
        task = ray.remote(finish_model).options(
            num_cpus=self.plan.per_worker.get("CPU", 0),
            num_gpus=self.plan.per_worker.get("GPU", 0),
            # In a trial of Ray Tune it would have to fit into the trial's own resources.
            scheduling_strategy="DEFAULT",
        )
        given = (self.run.hyperparameters, self.data, found[0], self.threads, events)
        finished: FinishedModel = ray.get(task.remote(*given))
        return finished


def choose_threads(run: TrainingRun, plan: resources.WorkerPlan) -> int | None:
    """Threads of each worker on CPUs, where they decide its bits; None on GPUs.

    Those that are asked for, or of the run that is resumed if it had as many workers, or else what
    the smallest node with room for a worker has for each.
    """
    if plan.use_gpu or run.config.threads:
        return run.config.threads
    stored = run.stored or {}
    same_workers = stored.get("num_workers") == list(plan.worker_range)
    if same_workers and stored.get("threads"):
        return int(stored["threads"])
    # Ray can be told of more CPUs than there are; with as many threads a step takes minutes.
    real = {ray.get_runtime_context().get_node_id(): os.cpu_count() or 1}
    cpus = []
    for node in usable_nodes():
        count = int(node["Resources"].get("CPU", 0))
        if count >= plan.per_worker["CPU"]:
            cpus.append(min(count, real.get(node["NodeID"], count)))
    workers_on_node = -(-plan.worker_range[0] // max(1, len(cpus)))
    return max(1, min(cpus, default=1) // workers_on_node)


def _train_environment() -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    joined = "0" if started_cluster() else "1"
    return {
        # How long Ray waits for nodes of so many workers. Then it looks what there is now: an
        # elastic run goes on with fewer, and any other waits again until `_end_late_workers`.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        # How soon a lost worker, or the end of the training, is noticed; Ray's 2 s would be 2 s
        # more of each run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Some clouds give only 30 s of notice before they take a node away. The process that asks
        # takes a second to start.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": joined,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # Attempts, workers and their logs, at /api/train/v2/runs/v1 of the dashboard. They are kept
        # by a process of 250 MiB that stays on the head; the first run of a cluster starts it, in
        # 3 s. A cluster of this process has no dashboard.
        "RAY_TRAIN_ENABLE_STATE_TRACKING": joined,
    }
