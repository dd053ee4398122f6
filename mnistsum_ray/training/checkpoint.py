"""Checkpoints of a run: the trainer's state, saved and loaded bit for bit, never as a pickle."""

import hashlib
import json
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
from mnistsum_ray.model.folder import HEADER_KEY, Weights, copy_weights, read_header
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.store import Location

CHECKPOINTS: Final = "checkpoints"
"""Folder in a run folder, with one folder of Ray Train for each attempt, and there epoch_00001, …

Ray Train rewrites its list of checkpoints in place, and a list that a kill has cut can never be
read again. So each attempt of a job has a new name for Ray, and the newest whole checkpoint is
looked for here.
"""

STATE_FORMAT: Final = "mnistsum_ray/14"
STATE_FILE: Final = "trainer.safetensors"
STATE_DIGEST: Final = "trainer.sha256"


class CheckpointError(RunError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


@dataclass
class TrainerState:
    """State of a run after an epoch; with the config it decides every bit of the rest."""

    epochs_done: int
    history: list[dict[str, Any]]  # lines of history.jsonl, one an epoch
    precision: str


def save_checkpoint(
    folder: Path, state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW
) -> None:
    """Write the state into a local folder: one file of tensors with a header, and its SHA-256."""
    tensors = {f"model.{name}": value for name, value in copy_weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"optimizer.{name}.{key}"] = copy
    header = {"format": STATE_FORMAT, "state": asdict(state)}
    data = save_tensors(tensors, {HEADER_KEY: json.dumps(header)})
    (folder / STATE_FILE).write_bytes(data)
    (folder / STATE_DIGEST).write_text(hashlib.sha256(data).hexdigest())


def read_checkpoint(folder: Location) -> tuple[TrainerState, Weights]:
    """The state in a checkpoint folder, and the tensors for `restore`.

    CheckpointError: a file is missing or damaged. RequestError: it is of another version.
    """
    unusable = f"checkpoint {folder.display} cannot be used:"
    try:
        data = (folder / STATE_FILE).read_bytes()
        expected = (folder / STATE_DIGEST).read_bytes()
    except MissingFileError as error:
        raise CheckpointError(f"{unusable} a file is missing ({error})") from None
    if hashlib.sha256(data).hexdigest().encode() != expected:
        problem = "is incomplete or damaged (its SHA-256 differs)"
        raise CheckpointError(f"{unusable} {STATE_FILE} {problem}")
    header = read_header(data)
    if header["format"] != STATE_FORMAT:
        other = f"it is of another version ({header['format']}, not {STATE_FORMAT})"
        raise RequestError(f"--resume: {unusable} {other}; resume with that version")
    return TrainerState(**header["state"]), load_tensors(data)


def restore(tensors: Weights, model: TwoHeadCNN, optimizer: MuonAdamW) -> None:
    """Load the tensors of a checkpoint into model and optimizer, in place, on their device."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        keys = [key for key in tensors if key.startswith(prefix)]
        state = {key.removeprefix(prefix): tensors[key] for key in keys}
        optimizer.load_state(parameter, state)


def newest_checkpoint(
    run: Location, say: Callable[[str], None]
) -> tuple[Location, TrainerState] | None:
    """The newest whole checkpoint of a run, and its state; newer ones that are damaged get a line.

    RequestError: the newest whole one is of another version.
    """
    files = (run / CHECKPOINTS).files()
    folders = {file.path.rpartition("/")[0] for file in files if file.name == STATE_FILE}

    def epoch_and_attempt(path: str) -> list[str]:
        *_, attempt, epoch = path.split("/")
        return [epoch, attempt]

    for path in sorted(folders, key=epoch_and_attempt, reverse=True):
        folder = run.at(path)
        try:
            return folder, read_checkpoint(folder)[0]
        except CheckpointError as error:
            say(str(error))
    return None


def latest_state(resumed: Location | None) -> tuple[TrainerState, Weights | None]:
    """State that a worker goes on from, and its tensors for `restore`; None at the beginning.

    They are those of the last checkpoint of this attempt, or else of the one that it resumed.
    """
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as folder:
            return read_checkpoint(Location(folder))
    if resumed is not None:
        return read_checkpoint(resumed)
    return TrainerState(0, [], ""), None


def report_epoch(state: TrainerState, model: TwoHeadCNN, optimizer: MuonAdamW, rank: int) -> None:
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
