"""Checkpoints of a run: the trainer's state, saved and loaded bit for bit, as safetensors and JSON, never as a pickle."""

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import ray.train
import torch
from ray.train import CheckpointUploadMode
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnistsum_ray.errors import MissingFileError, RequestError, RunError, one_line, shortened
from mnistsum_ray.model.folder import INTERFACE, Weights, copy_weights
from mnistsum_ray.model.network import Network
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.worker import Worker

STATE_FORMAT: Final = "mnistsum_ray/11"
"""Format of `trainer.json`; since 11 the optimizer's state is that of its `state_dict`."""
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"

_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Ray Train rewrites it in place, so a kill at that moment leaves it incomplete, and then
a restored run fails for good. So this program does not use it."""

_FOLDER: Final = re.compile(r"epoch_\d+(_step_\d+|_sum_head)?")
"""Names of checkpoint folders, see `TrainerState.name`."""


class CheckpointError(RunError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


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
    seconds: float = 0.0
    """Time that these steps took, in all commands together."""

    def step_losses(self) -> list[tuple[int, float]]:
        """Pairs of a step and the mean loss a row, in nats, since the step of the pair before."""
        points = [(0, 0, 0.0), *self.points]
        return [(now[0], (now[2] - before[2]) / (now[1] - before[1])) for before, now in pairwise(points)]


@dataclass
class TrainerState:
    """State of a run after an epoch or within one; with the config it determines every bit of the rest of the run."""

    epochs_done: int
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    precision: str
    progress: EpochProgress = field(default_factory=EpochProgress)
    """Progress within the epoch after `epochs_done`."""
    sum_head: dict[str, Any] | None = None
    """Result of fine-tuning the sum head: `steps`, whether it was `kept`, and the `Metrics` of `validation` and `test` after it,
    also where it was undone. None before, and in runs without it."""
    checksums: Tensor | None = None
    """Sums of the `order.row_checksums` of all rows of each file, int64[files]; None before they are known, and in memory."""

    @property
    def name(self) -> str:
        """Epochs that are done, and steps of the next one; names of later states of a run sort after those of earlier ones."""
        step = f"_step_{self.progress.steps:07d}" if self.progress.steps else ""
        return f"epoch_{self.epochs_done:05d}{step}" + ("_sum_head" if self.sum_head else "")


class Checkpointer:
    """Saves model, optimizer and `TrainerState` through Ray Train; all workers take part.

    The lock of the run folder, `held`, is checked before each write; `seconds` pass between checkpoints within an epoch.
    """

    def __init__(self, model: Network, optimizer: MuonAdamW, worker: Worker, held: OutputFolder, seconds: float) -> None:
        self._model = model
        self._optimizer = optimizer
        self._worker = worker
        self._held = held
        self._seconds = seconds
        self._saved = time.perf_counter()
        self._folder: Path | None = None
        """Folder of the last checkpoint, on rank 0. Ray Train deletes it when it has been uploaded, maybe after this object."""

    def idle(self) -> bool:
        """Whether no upload is under way: slow storage holds no step up, and an upload that begins is of the newest state."""
        return self._folder is None or not self._folder.exists()

    def due(self) -> bool:
        """True on rank 0, which decides for all, if the last checkpoint is old enough for one within the epoch."""
        return self._worker.rank == 0 and time.perf_counter() >= self._saved + self._seconds and self.idle()

    def save(self, state: TrainerState) -> None:
        """Save a checkpoint: rank 0 writes it, and Ray Train uploads it in the background; a worker ends after its uploads."""
        self._saved, checkpoint = time.perf_counter(), None
        if self._worker.rank == 0:
            self._held.check()  # another run may own the run folder by now
            self._folder = Path(tempfile.mkdtemp())
            save_checkpoint(self._folder, state, self._model, self._optimizer)
            checkpoint = ray.train.Checkpoint.from_directory(self._folder)
        ray.train.report(
            {"epochs_done": state.epochs_done},
            checkpoint=checkpoint,
            checkpoint_dir_name=state.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def latest_state(start: Location | None) -> tuple[TrainerState, Weights] | None:
    """State and tensors (for `restore`) that a worker goes on from; None: from the beginning.

    `start` is the checkpoint that `--resume` starts from. After a failure Ray Train has a later one. Errors: `read_checkpoint`.
    """
    latest = ray.train.get_checkpoint()
    place = start if latest is None else Location(latest.filesystem, latest.path, latest.path)
    if place is None:
        return None
    try:
        return read_checkpoint(place)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --resume starts from the one before it") from error


def save_checkpoint(folder: Path, state: TrainerState, model: Network, optimizer: MuonAdamW) -> None:
    """Write the state into a local folder.

    `trainer.json`, written last, holds the SHA-256 of the other file, so that an incomplete checkpoint is detected.
    """
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    checksums = {"checksums.files": state.checksums, "checksums.progress": state.progress.checksums}
    tensors |= {name: value for name, value in checksums.items() if value is not None}
    data = save_tensors(tensors)
    (folder / STATE_FILE).write_bytes(data)
    without_tensors = replace(state, checksums=None, progress=replace(state.progress, checksums=None))
    entries = {"format": STATE_FORMAT, "interface": INTERFACE, "sha256": hashlib.sha256(data).hexdigest()}
    fields = entries | asdict(without_tensors)
    (folder / STATE_CARD).write_text(json.dumps(fields) + "\n")


def read_checkpoint(folder: Location) -> tuple[TrainerState, Weights]:
    """The state in a checkpoint folder, and the tensors for `restore`.

    Raises:
        CheckpointError: a file is missing or incomplete.
        CheckpointVersionError: another version of this program wrote it.
        StorageError: the storage does not answer.
    """
    unusable = f"checkpoint {folder.display} cannot be used:"
    try:
        fields = (folder / STATE_CARD).read_json()
        if fields["format"] != STATE_FORMAT:
            raise CheckpointVersionError(f"{unusable} it was written by another version ({fields['format']}, not {STATE_FORMAT})")
        if (found := fields.get("interface", INTERFACE)) != INTERFACE:
            raise CheckpointVersionError(f"{unusable} it is of another network ({shortened(str(found))}, not {INTERFACE})")
        data = (folder / STATE_FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != fields["sha256"]:
            raise CheckpointError(f"{unusable} {STATE_FILE} is incomplete or damaged (SHA-256 differs)")
        tensors = load_tensors(data)
        points = [tuple(point) for point in fields["progress"]["points"]]
        progress = EpochProgress(**fields["progress"] | {"points": points, "checksums": tensors.get("checksums.progress")})
        plain = {name: fields[name] for name in ("epochs_done", "history", "precision", "sum_head")}
        return TrainerState(**plain, progress=progress, checksums=tensors.get("checksums.files")), tensors
    except MissingFileError as error:
        raise CheckpointError(f"{unusable} a file is missing ({error})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{unusable} {STATE_FILE} is incomplete or damaged ({one_line(error)})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{unusable} {STATE_CARD} is incomplete or damaged ({one_line(error)})") from None


def restore(tensors: Weights, model: Network, optimizer: MuonAdamW) -> None:
    """Load the tensors of a checkpoint into model and optimizer, in place, on the device of the model."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        optimizer.load_state(parameter, state)


def latest_valid_checkpoint(folder: Location, say: Callable[[str], None]) -> Location | None:
    """Newest complete checkpoint of a run, or None; each newer one that is damaged gets a console line.

    Raises:
        RequestError: the newest complete checkpoint is of another version.
    """
    for place in sorted(_checkpoints(folder), key=lambda place: place.path, reverse=True):
        try:
            read_checkpoint(place)
        except CheckpointVersionError as error:
            raise RequestError(f"--resume: {error}; resume with that version") from None
        except CheckpointError as error:
            say(str(error))
        else:
            return place
    return None


def delete_other_checkpoints(folder: OutputFolder, start: Location | None) -> None:
    """Delete all checkpoints of the run except the one that it resumes from, and Ray Train's list of them."""
    folder.delete(_SNAPSHOT)
    for place in _checkpoints(folder.place):
        if start is None or place.path != start.path:
            folder.delete_folder(place.name)


def _checkpoints(folder: Location) -> list[Location]:
    """The checkpoint folders of a run."""
    return [folder / entry.name for entry in folder.entries() if entry.is_folder and _FOLDER.fullmatch(entry.name)]
