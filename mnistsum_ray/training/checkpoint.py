"""Checkpoints of a run: the trainer's state, saved and loaded bit for bit, as safetensors and JSON, never as a pickle."""

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
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mnistsum_ray.errors import MissingFileError, RequestError, RunError, one_line, shortened
from mnistsum_ray.model.folder import INTERFACE, Weights, copy_weights
from mnistsum_ray.model.network import Network
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.store import Location

STATE_FORMAT: Final = "mnistsum_ray/12"
"""Format of `trainer.json`; since 12 it is always of the end of an epoch."""
STATE_FILE: Final = "trainer.safetensors"
STATE_CARD: Final = "trainer.json"

_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints. Ray Train rewrites it in place, so a kill at that moment leaves it incomplete, and then
a restored run fails for good. So this program does not use it."""

_FOLDER: Final = re.compile(r"epoch_\d+(_sum_head)?")
"""Names of checkpoint folders, see `TrainerState.name`."""


class CheckpointError(RunError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint that another version of this program wrote."""


@dataclass
class TrainerState:
    """State of a run after an epoch; with the config it determines every bit of the rest of the run."""

    epochs_done: int
    history: list[dict[str, Any]]
    """Lines of history.jsonl, one an epoch."""
    precision: str
    sum_head: dict[str, Any] | None = None
    """Result of fine-tuning the sum head: `steps`, whether it was `kept`, and the `Metrics` of
    `validation` and `test` after it, also where it was undone. None before, and in runs without it."""

    @property
    def name(self) -> str:
        """Name of the checkpoint; those of later states of a run sort after those of earlier ones."""
        return f"epoch_{self.epochs_done:05d}" + ("_sum_head" if self.sum_head else "")

    def metrics(self) -> dict[str, Any]:
        """What callbacks of Ray Train see of it; `validation` and `test` are those of the weights in it."""
        line = self.history[-1]
        newest = self.sum_head if self.sum_head and self.sum_head["kept"] else line
        return {
            "epoch": line["epoch"],
            "train_loss": line["train_loss"],
            "validation": newest["validation"],
            "test": newest["test"],
        }


def report_checkpoint(state: TrainerState, model: Network, optimizer: MuonAdamW, rank: int) -> None:
    """Report the state to Ray Train on every worker, with a checkpoint that rank 0 writes.

    Ray Train uploads it in the background; a worker ends after its uploads.
    """
    checkpoint = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp())
        save_checkpoint(folder, state, model, optimizer)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    ray.train.report(
        state.metrics(),
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
    try:
        if latest is None:
            return read_checkpoint(start) if start else None
        with latest.as_directory() as folder:
            return read_checkpoint(Location(folder))
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
    data = save_tensors(tensors)
    (folder / STATE_FILE).write_bytes(data)
    entries = {"format": STATE_FORMAT, "interface": INTERFACE, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / STATE_CARD).write_text(json.dumps(entries | asdict(state)) + "\n")


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
        state = {name: fields[name] for name in ("epochs_done", "history", "precision", "sum_head")}
        return TrainerState(**state), tensors
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


def delete_other_checkpoints(folder: Location, start: Location | None) -> None:
    """Delete all checkpoints of the run except the one that it resumes from, and Ray Train's list of them."""
    (folder / _SNAPSHOT).delete()
    for place in _checkpoints(folder):
        if start is None or place.path != start.path:
            place.delete_folder()


def _checkpoints(folder: Location) -> list[Location]:
    """The checkpoint folders of a run."""
    files = (file.path.removeprefix(folder.path).lstrip("/") for file in folder.files())
    names = {file.partition("/")[0] for file in files if "/" in file}
    return [folder / name for name in names if _FOLDER.fullmatch(name)]
