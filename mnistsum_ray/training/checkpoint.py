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
from ray.train.collective import broadcast_from_rank_zero
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from mnistsum_ray.errors import CheckpointError, MissingFileError, RequestError, TaskError
from mnistsum_ray.model.folder import HEADER_KEY, copy_weights, read_header
from mnistsum_ray.storage.store import Location

CHECKPOINTS: Final = "checkpoints"
"""Folder in a run folder, with one folder of Ray Train for each attempt, and there epoch_00001, …

Ray Train rewrites its list of checkpoints in place, and a list that a kill has cut can never be
read again. So each attempt of a job has a new name for Ray, and the newest whole checkpoint is
looked for here.
"""

STATE_FORMAT: Final = "mnistsum_ray/15"
STATE_FILE: Final = "trainer.safetensors"
STATE_DIGEST: Final = "trainer.sha256"


@dataclass
class TrainerState:
    """State of a run after an epoch; with the config it decides every bit of the rest."""

    epochs_done: int
    history: list[dict[str, Any]]  # lines of history.jsonl, one an epoch
    precision: str
    task: str = ""  # its name
    code: str = ""  # as of `code_of`


def save_checkpoint(
    folder: Path, state: TrainerState, network: nn.Module, optimizer: Optimizer
) -> None:
    """Write the state into a local folder: one file of tensors with a header, and its SHA-256."""
    tensors = {f"model.{name}": value for name, value in copy_weights(network).items()}
    scalars = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                tensors[f"optimizer.{name}.{key}"] = copy
            else:
                scalars[f"optimizer.{name}.{key}"] = value
    header = {"format": STATE_FORMAT, "state": asdict(state), "scalars": scalars}
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        keeps = "the optimizer keeps what is neither a tensor nor a number, and cannot be saved"
        raise TaskError(f"task {state.task}: {keeps} ({error})") from None
    data = save_tensors(tensors, {HEADER_KEY: text})
    (folder / STATE_FILE).write_bytes(data)
    (folder / STATE_DIGEST).write_text(hashlib.sha256(data).hexdigest())


def read_checkpoint(folder: Location) -> tuple[TrainerState, dict[str, Any]]:
    """Return the state in a checkpoint folder, and the tensors and numbers for `restore`.

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
    return TrainerState(**header["state"]), load_tensors(data) | header["scalars"]


def restore(saved: dict[str, Any], network: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's tensors and numbers into network and optimizer, in place."""
    network.load_state_dict({name: saved[f"model.{name}"] for name in network.state_dict()})
    for name, parameter in network.named_parameters():
        prefix = f"optimizer.{name}."
        for key in (key for key in saved if key.startswith(prefix)):
            value = saved[key]
            if isinstance(value, Tensor):
                value = value.to(parameter.device)
                if value.shape == parameter.shape:  # AdamW needs momenta in its memory format
                    value = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)
            optimizer.state[parameter][key.removeprefix(prefix)] = value


def newest_checkpoint(run: Location, say: Callable[[str], None]) -> str | None:
    """Return the newest whole checkpoint of a run, as ATTEMPT/EPOCH; damaged ones get a line.

    RequestError: it is of another version.
    """
    folder = run / CHECKPOINTS
    names = []
    for file in folder.visible_files():
        *above, name = file.split("/")
        if name == STATE_FILE:
            names.append("/".join(above))

    def epoch_and_attempt(name: str) -> list[str]:
        attempt, epoch = name.split("/")  # whose names sort as they were made
        return [epoch, attempt]

    for name in sorted(names, key=epoch_and_attempt, reverse=True):
        try:
            read_checkpoint(folder / name)
            return name
        except CheckpointError as error:
            say(str(error))
    return None


def latest_state(
    run: Location, say: Callable[[str], None]
) -> tuple[TrainerState, dict[str, Any] | None]:
    """Return the state that a worker continues from, and what `restore` needs, or None.

    Rank 0 looks for the newest whole checkpoint, and all ranks take it. `ray.train.get_checkpoint`
    would give the last one of this attempt also where it is damaged, and none of another attempt.
    """
    is_first = ray.train.get_context().get_world_rank() == 0
    newest = newest_checkpoint(run, say) if is_first else None
    name: str | None = broadcast_from_rank_zero(newest)
    if name is None:
        return TrainerState(0, [], ""), None
    return read_checkpoint(run / CHECKPOINTS / name)


def report_epoch(state: TrainerState, network: nn.Module, optimizer: Optimizer, rank: int) -> None:
    """Report the last epoch to Ray Train on every worker, with a checkpoint that rank 0 writes.

    Ray Train uploads it in the background; a worker ends after its uploads.
    """
    checkpoint = None
    if rank == 0:
        folder = Path(tempfile.mkdtemp())  # which Ray Train deletes
        save_checkpoint(folder, state, network, optimizer)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    line = state.history[-1]
    ray.train.report(
        {name: line[name] for name in ("epoch", "train_loss", "validation", "test")},
        checkpoint=checkpoint,
        checkpoint_dir_name=f"epoch_{state.epochs_done:05d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
