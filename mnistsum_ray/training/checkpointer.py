"""Checkpoints of a training worker: restore at the start, save after each epoch and before a node is taken away."""

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import ray.train
from ray.train import CheckpointUploadMode

from mnistsum_ray.model.evaluation import Metrics, within_one_standard_error
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.events import EventSender
from mnistsum_ray.training.state import CheckpointError, EpochProgress, TrainerState, load_state, save_checkpoint
from mnistsum_ray.training.worker import Worker

_PREEMPTION_CHECK_SECONDS: Final = 2.0
"""Seconds between preemption checks; each is a barrier, so all workers wait for the slowest."""

_PREEMPTION_SAVE_SECONDS: Final = 10.0
"""Seconds between checkpoints while a node is about to be taken away; steps after the last one are trained again elsewhere."""


class Checkpointer:
    """Saves and restores model, optimizer and `TrainerState` through Ray Train."""

    def __init__(self, model: TwoHeadCNN, optimizer: MuonAdamW, worker: Worker, lock: FolderLock, events: EventSender) -> None:
        self._model, self._optimizer, self._worker = model, optimizer, worker
        self._lock, self._events = lock, events
        self._next_preemption_check = 0.0
        self._uploading: Path | None = None
        """Folder of the checkpoint that is uploaded in the background; Ray Train deletes it when it has been uploaded."""

    def restore(self, start: ray.train.Checkpoint | None) -> TrainerState | None:
        """Load the latest checkpoint of this run into model and optimizer; None if there is none.

        Args:
            start: the checkpoint that `--resume` starts from. After a failure Ray Train has a later one.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another version.
        """
        latest = ray.train.get_checkpoint() or start
        if latest is None:
            return None
        with latest.as_directory() as folder:
            try:
                state = load_state(Path(folder), self._model, self._optimizer)
            except CheckpointError as error:
                raise CheckpointError(
                    f"checkpoint {latest.path} cannot be used: {error}; --resume starts from the one before it"
                ) from error
        step = f", step {state.progress.steps} of the next" if state.progress.steps else ""
        self._events.note(f"going on after epoch {state.epochs_done}{step}, on {self._worker.world_size} workers")
        return state

    def save_epoch(self, state: TrainerState, trained: dict[str, Any], validation: Metrics, test: Metrics, *, last: bool) -> None:
        """Add a finished epoch to the state, select the best model by validation, and save a checkpoint.

        The checkpoint is uploaded while the next epoch trains. An epoch that ends before the upload does is not saved, so slow
        storage holds no epoch up, and an upload that begins is always of the newest state.

        Args:
            state: before the epoch; updated in place.
            trained: figures of `Trainer.train_epoch` and `evaluation_seconds`.
            validation: decides whether the epoch's model is selected.
            test: reported only.
            last: after the last epoch, the worker waits for the upload.
        """
        earlier = [line["validation"]["sum_accuracy"] for line in state.history]
        line: dict[str, Any] = {
            "epoch": state.epochs_done + 1,
            **trained,
            "validation": asdict(validation),
            "test": asdict(test),
            "best": within_one_standard_error(validation.sum_accuracy, earlier, validation.rows),
        }
        state.history.append(line)
        state.epochs_done, state.progress = line["epoch"], EpochProgress()
        if line["best"]:
            state.best = copy_weights(self._model)
        self._events.send("epoch", **line)
        folder_name = f"epoch_{state.epochs_done:05d}"
        if last:
            self.save(state, line, folder_name)
        elif self._worker.all_agree(self._uploading is None or not self._uploading.exists()):
            self.save(state, line, folder_name, CheckpointUploadMode.ASYNC)

    def preemption_check_due(self) -> bool:
        """True if this worker's clock asks for a preemption check; rank 0 decides for all, since the check is a barrier."""
        return self._worker.rank == 0 and time.perf_counter() >= self._next_preemption_check

    def save_if_preempted(self, state: TrainerState, progress: EpochProgress) -> None:
        """Save within an epoch if the node of any worker is about to be taken away; all ranks call this at the same step."""
        preempted = ray.train.get_preemption_info()
        interval = _PREEMPTION_SAVE_SECONDS if preempted else _PREEMPTION_CHECK_SECONDS
        self._next_preemption_check = time.perf_counter() + interval
        if preempted:
            state.progress = progress
            epoch = state.epochs_done + 1
            self._events.note(f"a node is about to be taken away: saving after step {progress.steps} of epoch {epoch}")
            self.save(state, {"epoch": epoch, "step": progress.steps}, f"epoch_{epoch:05d}_step_{progress.steps:07d}")

    def save(
        self,
        state: TrainerState,
        metrics: dict[str, Any],
        folder_name: str,
        mode: CheckpointUploadMode = CheckpointUploadMode.SYNC,
    ) -> None:
        """Report a checkpoint to Ray Train, which uploads it; rank 0 writes it, the others take part in the barrier."""
        if self._worker.rank != 0:
            ray.train.report(metrics, checkpoint=None, checkpoint_upload_mode=mode)
            return
        self._lock.check()  # another run may own the run folder by now
        folder = Path(tempfile.mkdtemp())
        try:
            save_checkpoint(folder, state, self._model, self._optimizer)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=folder_name,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._uploading = folder
