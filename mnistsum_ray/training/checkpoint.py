"""Checkpoints of a run: the trainer's state, saved and loaded bit for bit, as safetensors and JSON, never as a pickle."""

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import ray.train
import torch
from pyarrow.fs import FileSelector, FileType
from ray.train import CheckpointUploadMode
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.model.metrics import Metrics
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import Weights, copy_weights, describe_model
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import FolderLock
from mnistsum_ray.training.worker import Worker

STATE_FORMAT: Final = "mnistsum_ray/10"
"""Format of `trainer.json`; since 10 the weights are there once."""
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"

_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Ray Train rewrites it in place, so a kill at that moment leaves it incomplete, and then
a restored run fails for good. So this program does not use it."""

_FOLDER: Final = re.compile(r"epoch_\d+(_step_\d+|_sum_head)?")
"""Names of checkpoint folders, see `TrainerState.name`."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message says why."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint that another version of this program wrote."""


@dataclass(frozen=True)
class EpochProgress:
    """Progress within an epoch over all workers. A resumed epoch starts from it, so no row is counted twice."""

    steps: int = 0
    loss: float = 0.0
    """Sum over the rows, in nats."""
    rows: int = 0
    row_ids: int = 0
    """Sum of the scrambled ids of these rows, see `order.mix_ids`."""
    points: list[tuple[int, int, float]] = field(default_factory=list)
    """`steps`, `rows` and `loss` at some steps of the epoch, up to this one, for the curve of the loss."""
    checksums: Tensor | None = None
    """Sums of the `order.row_checksums` of these rows of each file, int64[files]; None for rows in memory."""

    def step_losses(self) -> list[tuple[int, float]]:
        """Pairs of a step and the mean loss a row, in nats, since the step of the pair before."""
        points = [(0, 0, 0.0), *self.points]
        return [(now[0], (now[2] - before[2]) / (now[1] - before[1])) for before, now in pairwise(points)]


@dataclass(frozen=True)
class SumHeadResult:
    """Result of fine-tuning the sum head after the last epoch."""

    steps: int
    kept: bool
    """False if the result was undone."""
    validation: Metrics
    """Metrics after fine-tuning, also where it was undone."""
    test: Metrics


@dataclass
class TrainerState:
    """State of a run after an epoch or within one; with the config it determines every bit of the rest of the run."""

    epochs_done: int
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    precision: str
    progress: EpochProgress = field(default_factory=EpochProgress)
    """Progress within the epoch after `epochs_done`."""
    sum_head: SumHeadResult | None = None
    """None before fine-tuning, and in runs without it."""
    checksums: Tensor | None = None
    """Sums of the `order.row_checksums` of all rows of each file, int64[files]; None before they are known, and in memory."""

    @property
    def name(self) -> str:
        """Epochs that are done, and steps of the next one; names of later states of a run sort after those of earlier ones."""
        step = f"_step_{self.progress.steps:07d}" if self.progress.steps else ""
        return f"epoch_{self.epochs_done:05d}{step}" + ("_sum_head" if self.sum_head else "")

    def describe(self, weights: Weights) -> dict[str, Any]:
        """Description of the model after the last epoch, see `serialization.describe_model`; `weights` are those published."""
        line, result = self.history[-1], self.sum_head
        metrics = before = {split: line[split] for split in ("validation", "test")}
        sum_head = None
        if result is not None:
            after = {"validation": asdict(result.validation), "test": asdict(result.test)}
            sum_head = {"steps": result.steps, "kept": result.kept, "before": before, "after": after}
            metrics = after if result.kept else before
        return describe_model(weights, epoch=line["epoch"], metrics=metrics, sum_head=sum_head)


class Checkpointer:
    """Saves and restores model, optimizer and `TrainerState` through Ray Train.

    Args:
        model: the network that is trained.
        optimizer: of its parameters.
        worker: this one; all take part in each call.
        lock: on the run folder; checked before each write.
        seconds: between checkpoints within an epoch.
    """

    def __init__(self, model: TwoHeadCNN, optimizer: MuonAdamW, worker: Worker, lock: FolderLock, seconds: float) -> None:
        self._model, self._optimizer, self._worker, self._lock, self._seconds = model, optimizer, worker, lock, seconds
        self._saved = time.perf_counter()
        self._uploading: Path | None = None
        """Folder of the checkpoint that is uploaded in the background; Ray Train deletes it when it has been uploaded."""

    def restore(self, start: Location | None) -> TrainerState | None:
        """Load the latest checkpoint of this run into model and optimizer; None if there is none.

        Args:
            start: the checkpoint that `--resume` starts from. After a failure Ray Train has a later one.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another version.
        """
        latest = ray.train.get_checkpoint()
        if latest is None and start is not None:
            latest = ray.train.Checkpoint(start.path, start.filesystem)
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
        self._worker.events.note(f"going on after epoch {state.epochs_done}{step}, on {self._worker.world_size} workers")
        return state

    def due(self) -> bool:
        """True on rank 0, which decides for all, if the last checkpoint is old enough for one within the epoch."""
        return self._worker.rank == 0 and time.perf_counter() >= self._saved + self._seconds

    def save_step(self, state: TrainerState, progress: EpochProgress) -> None:
        """Save within an epoch, unless an upload is still under way."""
        if self._can_upload():
            self.save(replace(state, progress=progress), CheckpointUploadMode.ASYNC)

    def save_epoch(self, state: TrainerState, trained: dict[str, Any], validation: Metrics, test: Metrics, *, last: bool) -> None:
        """Add a finished epoch to the state, in place, and save a checkpoint.

        The checkpoint is uploaded while the next epoch trains. An epoch that ends before the upload does is not saved, so slow
        storage holds no epoch up, and an upload that begins is always of the newest state. Only the last one is waited for.
        """
        state.epochs_done, state.progress = state.epochs_done + 1, EpochProgress()
        line = {"epoch": state.epochs_done, **trained, "validation": asdict(validation), "test": asdict(test)}
        state.history.append(line)
        self._worker.events.send("epoch", **line)
        if last or self._can_upload():
            self.save(state, CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC)

    def _can_upload(self) -> bool:
        return self._worker.all_agree(self._uploading is None or not self._uploading.exists())

    def save(self, state: TrainerState, mode: CheckpointUploadMode = CheckpointUploadMode.SYNC) -> None:
        """Report a checkpoint to Ray Train, which uploads it; rank 0 writes it, the others take part in the barrier."""
        self._saved, metrics = time.perf_counter(), {"epochs_done": state.epochs_done}
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
                checkpoint_dir_name=state.name,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._uploading = folder


def save_checkpoint(folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Write the state into a local folder.

    `trainer.json`, written last, holds the SHA-256 of the other file, so that an incomplete checkpoint is detected.
    """
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    for name, _, moments in optimizer.states():
        for key, value in moments.items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    checksums = {"checksums.files": state.checksums, "checksums.progress": state.progress.checksums}
    tensors |= {name: value for name, value in checksums.items() if value is not None}
    data = save_tensors(tensors)
    (folder / STATE_FILE).write_bytes(data)
    fields = {
        "format": STATE_FORMAT,
        "epochs_done": state.epochs_done,
        "progress": asdict(replace(state.progress, checksums=None)),
        "precision": state.precision,
        "history": state.history,
        "sum_head": None if state.sum_head is None else asdict(state.sum_head),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / STATE_CARD).write_text(json.dumps(fields) + "\n")


def load_state(folder: Path, model: TwoHeadCNN, optimizer: MuonAdamW) -> TrainerState:
    """Load a checkpoint into model and optimizer, in place, on the device of the model.

    Raises:
        CheckpointError: the files are incomplete, or of another version. Other errors, which another attempt may not meet, are
            raised as they are.
    """
    try:
        fields = json.loads((folder / STATE_CARD).read_text())
        _check_format(fields)
        groups: dict[str, Weights] = {"checksums": {}}
        for name, value in load_tensors((folder / STATE_FILE).read_bytes()).items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = value
        model.load_state_dict(groups["model"])
        _load_moments(optimizer, groups["optimizer"])
        result, checksums = fields["sum_head"], groups["checksums"]
        if result is not None:
            result = SumHeadResult(**result | {split: Metrics(**result[split]) for split in ("validation", "test")})
        points = [tuple(point) for point in fields["progress"]["points"]]
        progress = EpochProgress(**fields["progress"] | {"points": points, "checksums": checksums.get("progress")})
        return TrainerState(
            fields["epochs_done"], fields["history"], fields["precision"], progress, result, checksums.get("files")
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(one_line(error)) from error


def _load_moments(optimizer: MuonAdamW, tensors: Weights) -> None:
    states = {name: (parameter, moments) for name, parameter, moments in optimizer.states()}
    for name, value in tensors.items():
        key, _, parameter_name = name.partition(".")
        parameter, moments = states[parameter_name]
        if key not in moments:
            # A moment must have its parameter's memory format, which the file does not record.
            same_shape = value.shape == parameter.shape
            moments[key] = torch.empty_like(parameter if same_shape else value, device=parameter.device).detach()
        moments[key].copy_(value)


def _check_format(fields: dict[str, Any]) -> None:
    if fields["format"] != STATE_FORMAT:
        raise CheckpointVersionError(f"it was written by another version ({fields['format']}, not {STATE_FORMAT})")


def verify_checkpoint(folder: Location) -> None:
    """Compare the tensors of a checkpoint folder with their checksum.

    Raises:
        CheckpointError: a file is missing or incomplete.
        CheckpointVersionError: another version of this program wrote it.
        OSError: the storage does not answer.
    """
    try:
        fields = (folder / STATE_CARD).read_json()
        _check_format(fields)
        if hashlib.sha256((folder / STATE_FILE).read_bytes()).hexdigest() != fields["sha256"]:
            raise CheckpointError(f"{STATE_FILE} is incomplete or damaged (SHA-256 differs)")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"a file is missing ({one_line(error)})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{STATE_CARD} is incomplete or damaged ({one_line(error)})") from None


def latest_valid_checkpoint(folder: Location, say: Callable[[str], None]) -> Location | None:
    """Newest complete checkpoint of a run, or None; each newer one that is damaged gets a console line.

    Raises:
        RequestError: the newest complete checkpoint is of another version.
    """
    infos = folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True))
    names: list[str] = [info.base_name for info in infos if info.type == FileType.Directory and _FOLDER.fullmatch(info.base_name)]
    for name in sorted(names, reverse=True):
        checkpoint = folder / name
        try:
            verify_checkpoint(checkpoint)
        except CheckpointVersionError as error:
            raise RequestError(
                f"--resume: checkpoint {checkpoint.display} cannot be used: {error}; resume with that version"
            ) from None
        except CheckpointError as error:
            say(f"checkpoint {checkpoint.display} cannot be used: {error}")
            continue
        return checkpoint
    return None


def delete_other_checkpoints(folder: Location, start: Location | None) -> None:
    """Delete all checkpoints of the run except the one that it resumes from, and Ray Train's list of them."""
    (folder / _SNAPSHOT).delete()
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        if _FOLDER.fullmatch(info.base_name) and (start is None or info.path != start.path):
            folder.filesystem.delete_dir(info.path)
