"""Model folders: `model.safetensors` holds the weights and, in its header, the description; `model.json` is a copy to read.

With both in one file, no kill and no reader in between meets weights beside the description of others.
"""

import hashlib
import json
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, one_line
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, TwoHeadCNN
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location

MODEL_FORMAT: Final = "mnistsum_ray/5"
"""Format of a model folder; since 5 the temperatures are folded into the weights."""
WEIGHTS_FILE: Final = "model.safetensors"
DESCRIPTION_FILE: Final = "model.json"

_HEADER_KEY: Final = "mnistsum_ray"

Weights = dict[str, Tensor]


def copy_weights(model: TwoHeadCNN) -> Weights:
    """A copy of the weights on the CPU, float32, contiguous."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def describe_model(
    weights: Weights, *, epoch: int, metrics: dict[str, dict[str, Any]], sum_head: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The description of weights: the epoch that they are from, `Metrics` by split, and an entry on the fine-tuning."""
    return {
        "format": MODEL_FORMAT,
        "network": TwoHeadCNN.__name__,
        "parameters": sum(value.numel() for value in weights.values()),
        "sha256": checksum(weights),
        "input": {
            "image": "28 x 28 grayscale, uint8, 0 background, 255 ink",
            "scaled": "(image / 255 - mean) / std",
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "number": f"0..{NUMBERS - 1}",
        },
        "output": {head.name: f"{head.classes} scores" for head in HEADS},
        "epoch": epoch,
        "sum_head": sum_head,
        **metrics,
    }


def save_model(folder: OutputFolder, weights: Weights, description: dict[str, Any]) -> None:
    """Write a model folder. The weights come last, and while they are not there, there is no model."""
    folder.write(DESCRIPTION_FILE, description)
    folder.write(WEIGHTS_FILE, save_tensors(weights, {_HEADER_KEY: json.dumps(description, allow_nan=False)}))


def load_model(folder: Location) -> tuple[TwoHeadCNN, dict[str, Any]]:
    """Load a model folder, or the `model` folder of a run: the network in evaluation mode, and the description.

    Raises:
        RequestError: there is no model, its format or network is another, its checksum is wrong, or a weight is not finite.
    """
    try:
        if not (folder / WEIGHTS_FILE).exists():
            folder = folder / "model"
        data = (folder / WEIGHTS_FILE).read_bytes()
    except MissingFileError:
        raise RequestError(f"{folder.display}: holds no model (no {WEIGHTS_FILE})") from None
    except StorageError as error:
        raise RequestError(str(error)) from None
    try:
        weights = load_tensors(data)
        description = read_description(data)
    except (SafetensorError, ValueError) as error:
        raise RequestError(f"{folder.display}: {WEIGHTS_FILE} cannot be used: {one_line(error)}") from None
    if checksum(weights) != description["sha256"]:
        raise RequestError(f"{folder.display}: {WEIGHTS_FILE} is damaged (the SHA-256 of its weights differs)")
    model = TwoHeadCNN()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RequestError(f"{folder.display}: its tensors are not those of the network ({one_line(error)})") from None
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise RequestError(f"{folder.display}: {broken} holds NaN or infinite weights; train again")
    return model.eval(), description


def read_description(data: bytes) -> dict[str, Any]:
    """The description in the header of a `model.safetensors`, which is JSON after eight bytes with its length.

    Raises:
        ValueError: there is none, or another version wrote it.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header.get("__metadata__", {}).get(_HEADER_KEY, "null"))
    if not isinstance(description, dict) or description.get("format") != MODEL_FORMAT:
        raise ValueError(f"its format is not {MODEL_FORMAT!r}; train again with this version")
    for name, kind in (("sha256", str), ("epoch", int), ("parameters", int)):
        if not isinstance(description.get(name), kind):
            raise ValueError(f"its {name!r} is {str(description.get(name, 'missing'))[:80]}")
    return description


def checksum(weights: Weights) -> str:
    """SHA-256 over the names, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
