"""Model folders: `model.safetensors`, whose header has a description, and a copy, `model.json`."""

import hashlib
import json
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mnistsum_ray.errors import RequestError, one_line, shortened
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error
from mnistsum_ray.task import Task

MODEL_FORMAT: Final = "mnistsum_ray/6"
"""A model of another format is refused."""
WEIGHTS_FILE: Final = "model.safetensors"
DESCRIPTION_FILE: Final = "model.json"
HEADER_KEY: Final = "mnistsum_ray"

Weights = dict[str, Tensor]
"""By the names of the parameters and buffers."""


class LoadedModel(NamedTuple):
    """A model, and what its folder says of it."""

    task: Task  # with the settings of the model
    network: nn.Module  # in evaluation mode, on the CPU
    description: dict[str, Any]  # contents of model.json


def copy_weights(model: nn.Module) -> Weights:
    """Return a copy of the weights on the CPU, contiguous."""
    copied = {}
    for name, value in model.state_dict().items():
        copied[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copied


def describe_model(task: Task, weights: Weights, code: str = "", **entries: Any) -> dict[str, Any]:
    """Return the description of the weights of a task's network, whose `code_of` the driver knows.

    `entries` are added.
    """
    return {
        "format": MODEL_FORMAT,
        "task": {"name": task.name, "code": code},
        "settings": task.settings.model_dump(mode="json"),
        "parameters": sum(values.numel() for values in weights.values()),
        "sha256": checksum(weights),
        **entries,
    }


def write_model(folder: Location, weights: Weights, description: dict[str, Any]) -> None:
    """Write a model folder. While the weights, which come last, are not there, it has no model."""
    header = {HEADER_KEY: json.dumps(description, allow_nan=False)}
    (folder / DESCRIPTION_FILE).write(description)
    (folder / WEIGHTS_FILE).write(save_tensors(weights, header))


def load_model(place: Location, task: type[Task]) -> LoadedModel:
    """Return the model in a model folder, in a run, or in the file of the weights itself.

    Errors are those of `api.load_model`; a model of another task is refused.
    """
    # The place itself comes last: some stores say of a folder that it is an empty file.
    candidates = (place / WEIGHTS_FILE, place / "model" / WEIGHTS_FILE, place)
    with as_request_error():
        file = next((file for file in candidates if file.file_entry()), None)
        if file is None:
            raise RequestError(f"{place.display}: holds no model (no {WEIGHTS_FILE})")
        data = file.read_bytes()
    try:
        weights = load_tensors(data)
        description = read_header(data)
        if description.get("format") != MODEL_FORMAT:
            raise ValueError(f"its format is not {MODEL_FORMAT!r}; train again with this version")
        if checksum(weights) != description["sha256"]:
            raise ValueError("it is damaged (the SHA-256 of its weights differs)")
        name = description["task"]["name"]
        if name != task.name:
            raise ValueError(f"its task is {name}, and not {task.name}; add its --task")
        made = task(task.Settings(**description["settings"]))
        network = made.network().eval()
        network.load_state_dict(weights)
    except Exception as error:  # libraries raise many types for bytes that anybody may have written
        reason = shortened(one_line(error))
        raise RequestError(f"{file.display}: cannot be used: {reason}") from None
    return LoadedModel(made, network, description)


def read_header(data: bytes) -> dict[str, Any]:
    """Return what a safetensors file's header has under HEADER_KEY."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return dict(json.loads(metadata.get(HEADER_KEY, "{}")))


def checksum(weights: Weights) -> str:
    """SHA-256 over the names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
