"""Driver of a training run: wait for workers, read the rows, run Ray Train, publish the model."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from mnistsum_ray.cluster import resources
from mnistsum_ray.cluster.connection import started_cluster
from mnistsum_ray.cluster.nodes import check_shared_storage, usable_nodes
from mnistsum_ray.cluster.workarounds import detached_data_actors, make_interruptible
from mnistsum_ray.data.inputs import report_skipped
from mnistsum_ray.data.randomness import TrainingOrder
from mnistsum_ray.data.sources import FileGroup, Source
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
from mnistsum_ray.reporting.prometheus import JobMetrics
from mnistsum_ray.reporting.results import TrainResult
from mnistsum_ray.storage.lock import LOCK_NAME, folder_lock
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.analysis import FinishedModel
from mnistsum_ray.training.checkpoint import CHECKPOINTS, newest_checkpoint
from mnistsum_ray.training.events import EventFollower
from mnistsum_ray.training.loop import FailureLines, LoopConfig, Start, train_loop_per_worker
from mnistsum_ray.training.pipeline import StepsInOrder, start_points
from mnistsum_ray.training.preflight import TrainingRun
from mnistsum_ray.training.record import RunRecord
from mnistsum_ray.training.rows import RowBlocks, TrainingData, check_space, load_blocks

_ROWS_PER_GPU: Final = 256
"""Rows of a step below which another GPU is of no use: the kernels of so small a network take as
long for 32 rows as for 256."""


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
    started = time.monotonic()
    how_to_go_on = "nothing was begun; the same command tries again"
    try:
        with folder_lock(run.folder, "--name"):
            training = _begin(run, console)
            how_to_go_on = run.how_to_resume()
            return training.fit(callbacks, started)
    except ray.exceptions.RayError as error:  # of the driver's own tasks; some are OSErrors too
        console.say_lines(str(error))
        raise RunError(f"{root_cause(error)}; {how_to_go_on}") from error
    except OSError as error:
        raise RunError(f"--storage-path {one_line(error)}; {how_to_go_on}") from error


def _find_start(run: TrainingRun, say: Callable[[str], None]) -> Start:
    """Find the newest checkpoint, or else the weights of `--init-from`."""
    if run.config.resume:
        found = newest_checkpoint(run.folder, say)
        if found is not None:
            checkpoint, state = found
            return Start(checkpoint, state.history)
        if (run.stored or {}).get("status") == "finished":
            raise RequestError(
                f"--resume: run {run.config.name} is finished, and no checkpoint is left to "
                "resume from; its files stay as they are; start another run"
            )
        say("no checkpoint can be used, so the run starts from the beginning")
    if run.config.init_from is None:
        return Start()
    network, description = load_model(locate(run.config.init_from, "--init-from"))
    init_from = {"model": run.config.init_from, "sha256": description["sha256"]}
    return Start(weights=network.state_dict(), init_from=init_from)


def _begin(run: TrainingRun, console: Console) -> "_Training":
    """Wait for what the workers need, read the rows while it is held, and write the manifest."""
    parameters = run.hyperparameters
    start = _find_start(run, console.say)  # before the wait, so that a wrong one is refused at once
    gpus = max(1, parameters.batch_size // _ROWS_PER_GPU)
    with resources.reserve(run.config, console.say, gpus) as plan:
        threads = choose_threads(run, plan)
        source, blocks, sha256 = _load_rows(run, console)
        order = TrainingOrder(source.train, blocks.bounds, parameters.batch_size, parameters.seed)
        data = ray.put(TrainingData(blocks, order, source.validation, source.test))
        record = RunRecord(run, console.say, plan, threads, start.history)
        record.begin(source, sha256, start.init_from)
    train, validation, test = map(len, (source.train, source.validation, source.test))
    of = source.name if source.name == "sample" else f"{source.name} ({source.location})"
    counts = f"{train:,} training, {validation:,} validation, {test:,} test rows of {of}"
    console.say(f"run {run.config.name}: {counts}; {plan.describe()}")
    metrics = JobMetrics("train", run.folder.display, len(start.history) * train)
    return _Training(run, console, record, metrics, start, plan, threads, data)


def _load_rows(run: TrainingRun, console: Console) -> tuple[Source, RowBlocks, str]:
    """Read the rows as `load_blocks`, and say which there are, and which are left out."""
    source, say = run.source, console.say
    if source.notice:
        say(source.notice)
    report_skipped(source.skipped, say)
    files = {"--storage-path": run.folder / LOCK_NAME}
    first = source.groups[0]
    if isinstance(first, FileGroup):  # tasks read it, on any node
        files["--data"] = first.files[0].path
    check_shared_storage(files, say)
    say(check_space(source.rows))
    loaded = load_blocks(
        source,
        skip_bad_rows=run.config.skip_bad_rows,
        on_progress=Progress(console.progress, "rows read", source.rows),
    )
    bad = loaded[0].bad
    if bad.total:
        say(f"left out: {bad.total:,} of {counted(source.rows, 'row')}: {bad.describe()}")
    return loaded


@dataclass(frozen=True)
class _Training:
    """A run that has begun: its manifest is written, and its rows are in the object store."""

    run: TrainingRun
    console: Console
    record: RunRecord
    metrics: JobMetrics
    start: Start
    plan: resources.WorkerPlan
    threads: int | None
    data: "ray.ObjectRef[TrainingData]"

    def fit(self, callbacks: Sequence[ray.train.UserCallback], started: float) -> TrainResult:
        """Train and publish. The manifest says how a run ends that does not finish."""
        try:
            wait_seconds = self.run.config.wait_seconds
            events = EventFollower(self.console, self.record, self.metrics, wait_seconds)
            with events.following():
                finished = self._train(events, callbacks)
            return self.record.publish(finished, started)
        except KeyboardInterrupt:
            self.record.write_status("stopped")
            raise RunInterrupted(self.run.how_to_resume()) from None
        except BaseException:
            self.record.write_status("failed")
            raise

    def _train(
        self, events: EventFollower, callbacks: Sequence[ray.train.UserCallback]
    ) -> FinishedModel:
        """Train the epochs that are left with Ray Train, which starts workers again that fail."""
        run, parameters, use_gpu = self.run, self.run.hyperparameters, self.plan.use_gpu
        low, high = self.plan.worker_range
        loop = LoopConfig(parameters, self.threads, self.data, events.queue, self.start)
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"loop": loop},
            datasets=start_points(range(len(self.start.history), parameters.epochs)),
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
                callbacks=[*callbacks, FailureLines(events.queue)],
                failure_config=ray.train.FailureConfig(
                    max_failures=run.config.max_failures, max_preemption_failures=-1
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            ),
        )
        if not started_cluster():
            detached_data_actors()
        abort = make_interruptible(trainer)
        events.end_if_silent(abort)
        try:
            with default_environment(_train_environment()):
                # A text: a failure that another attempt would meet again.
                finished: FinishedModel | str = trainer.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            raise self._explained(error, events.gave_up_after) from error
        except KeyboardInterrupt:
            # First, since a cluster gives a stopped job only a few seconds.
            self.record.write_status("stopped")
            abort()
            raise
        if isinstance(finished, str):
            raise RunError(finished)
        return finished

    def _explained(self, error: Exception, gave_up_after: float | None) -> RunError:
        """Why Ray Train has given up, in one line."""
        resume = self.run.how_to_resume()
        if gave_up_after is not None:
            silence = f"no word from the workers for {gave_up_after:.0f} s"
            return TryAgainError(f"{silence}: {resources.explain_worker_silence()}; {resume}")
        if isinstance(error, ray.train.WorkerGroupError):
            failures = counted(self.run.config.max_failures + 1, "failure")
            return RunError(f"gave up after {failures} of workers, see above; {resume}")
        self.console.say_lines(str(error))
        cause = getattr(error, "controller_failure", error)
        return RunError(f"{root_cause(cause)}; {resume}")


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
    here = ray.get_runtime_context().get_node_id()
    cpus = []
    for node in usable_nodes():
        count = int(node["Resources"].get("CPU", 0))
        if count < plan.per_worker["CPU"]:
            continue
        if node["NodeID"] == here:
            # Ray can be told of more than there are, and with so many threads a step takes minutes.
            count = min(count, os.cpu_count() or 1)
        cpus.append(count)
    # Elastic ones may all be on the nodes that are there now.
    workers_on_node = -(-plan.workers // max(1, len(cpus)))
    return max(1, min(cpus, default=1) // workers_on_node)


def _train_environment() -> dict[str, str]:
    """Options that Ray Train reads only from environment variables."""
    joined = "0" if started_cluster() else "1"
    return {
        # How long Ray waits for nodes of so many workers. Then it looks what there is now: an
        # elastic run goes on with fewer, and any other waits again until `EventFollower` ends it.
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
