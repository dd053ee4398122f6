"""Checkpoints of a run: the trainer's state, saved and loaded bit for bit, as safetensors, never as a pickle."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import ray.train
import torch
from ray.train import CheckpointUploadMode
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mnistsum_ray.errors import MissingFileError, RequestError, RunError
from mnistsum_ray.model.folder import INTERFACE, Weights, copy_weights, safetensors_header
from mnistsum_ray.model.network import Network
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.store import Location

CHECKPOINTS: Final = "checkpoints"
"""Folder in a run folder with one folder of Ray Train for each attempt: 0001, 0002, …

Ray Train rewrites its list of checkpoints in place, and a run that is restored from one which a kill
has cut fails for good. So each attempt of a job has a new name for Ray, and the newest whole
checkpoint is looked for here.
"""

STATE_FORMAT: Final = "mnistsum_ray/13"
STATE_FILE: Final = "trainer.safetensors"
STATE_DIGEST: Final = "trainer.sha256"

_CHECKPOINT: Final = re.compile(rf"{CHECKPOINTS}/\d+/epoch_\d+")


class CheckpointError(RunError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


@dataclass
class TrainerState:
    """State of a run after an epoch; with the config it determines every bit of the rest of the run."""

    epochs_done: int
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    precision: str


def report_epoch(state: TrainerState, model: Network, optimizer: MuonAdamW, rank: int) -> None:
    """Report the last epoch to Ray Train on every worker, with a checkpoint that rank 0 writes.

    Ray Train uploads it in the background; a worker ends after its uploads.
    """
    checkpoint = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp())  # which Ray Train deletes
        save_checkpoint(folder, state, model, optimizer)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    line = state.history[-1]
    ray.train.report(
        {name: line[name] for name in ("epoch", "train_loss", "validation", "test")},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"epoch_{state.epochs_done:05d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def latest_state(start: Location | None) -> tuple[TrainerState, Weights] | None:
    """State and tensors (for `restore`) that a worker goes on from; None: from the beginning.

    `start` is the checkpoint that `--resume` starts from. After a failure Ray Train has a later one.
    Errors: `read_checkpoint`.
    """
    latest = ray.train.get_checkpoint()
    if latest is None:
        return read_checkpoint(start) if start else None
    with latest.as_directory() as folder:
        return read_checkpoint(Location(folder))


def save_checkpoint(folder: Path, state: TrainerState, model: Network, optimizer: MuonAdamW) -> None:
    """Write the state into a local folder: one file with tensors and figures, and its SHA-256."""
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    figures = {"format": STATE_FORMAT, "interface": INTERFACE, "state": asdict(state)}
    data = save_tensors(tensors, {"mnistsum_ray": json.dumps(figures)})
    (folder / STATE_FILE).write_bytes(data)
    (folder / STATE_DIGEST).write_text(hashlib.sha256(data).hexdigest())


def read_checkpoint(folder: Location) -> tuple[TrainerState, Weights]:
    """The state in a checkpoint folder, and the tensors for `restore`.

    Raises:
        CheckpointError: a file is missing or damaged.
        RequestError: it is of another version or network.
        StorageError: the storage does not answer.
    """
    unusable = f"checkpoint {folder.display} cannot be used:"
    try:
        data = (folder / STATE_FILE).read_bytes()
        expected = (folder / STATE_DIGEST).read_bytes()
    except MissingFileError as error:
        raise CheckpointError(f"{unusable} a file is missing ({error})") from None
    if hashlib.sha256(data).hexdigest().encode() != expected:
        raise CheckpointError(f"{unusable} {STATE_FILE} is incomplete or damaged (its SHA-256 differs)")
    figures = json.loads(safetensors_header(data)["mnistsum_ray"])
    if (figures["format"], figures["interface"]) != (STATE_FORMAT, INTERFACE):
        raise RequestError(
            f"--resume: {unusable} it is of another version or network ({figures['format']}, not {STATE_FORMAT}); "
            "resume with that version"
        )
    return TrainerState(**figures["state"]), load_tensors(data)


def restore(tensors: Weights, model: Network, optimizer: MuonAdamW) -> None:
    """Load the tensors of a checkpoint into model and optimizer, in place, on the device of the model."""
    load_weights(tensors, model)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        optimizer.load_state(parameter, state)


def load_weights(tensors: Weights, model: Network) -> None:
    """Load the weights of a checkpoint into a model, in place."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})


def newest_checkpoint(run: Location, say: Callable[[str], None]) -> tuple[Location, TrainerState] | None:
    """The newest whole checkpoint of a run, and its state; each newer one that is damaged gets a line.

    Raises:
        RequestError: the newest whole checkpoint is of another version.
    """
    folders = checkpoints(run)
    for folder in sorted(folders, key=lambda folder: (_epoch_of(folder), folder.path), reverse=True):
        try:
            return folder, read_checkpoint(folder)[0]
        except CheckpointError as error:
            say(str(error))
    return None


def checkpoints(run: Location) -> list[Location]:
    """The checkpoint folders of a run, of all attempts."""
    return [run / name for name in sorted({found[0] for found in map(_CHECKPOINT.match, _names(run)) if found})]


def next_attempt(run: Location) -> str:
    """Name for Ray of the next attempt of a run."""
    attempts = {name.split("/")[1] for name in _names(run) if name.startswith(f"{CHECKPOINTS}/")}
    return f"{max(map(int, filter(str.isdecimal, attempts)), default=0) + 1:04d}"


def _names(run: Location) -> list[str]:
    return [file.path.removeprefix(run.path).lstrip("/") for file in run.files()]


def _epoch_of(folder: Location) -> int:
    return int(folder.path.rpartition("_")[2])
