"""Read model folders as arrays, without PyTorch; `serialization` writes them and makes the network.

`model.safetensors` holds the weights and, in its header, the description; `model.json` is a copy to read. With both in one file,
no kill and no reader in between meets weights beside the description of others.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.errors import MissingFileError, RequestError, StorageError, one_line, shortened
from mnistsum_ray.model.heads import HEADS, NETWORK
from mnistsum_ray.storage.location import Location

MODEL_FORMAT: Final = "mnistsum_ray/5"
"""Format of a model folder; since 5 the temperatures are folded into the weights."""
WEIGHTS_FILE: Final = "model.safetensors"
DESCRIPTION_FILE: Final = "model.json"

HEADER_KEY: Final = "mnistsum_ray"
"""Key of the description in the header of WEIGHTS_FILE."""

INTERFACE: Final = {
    "network": NETWORK,
    "number": f"0..{NUMBERS - 1}",
    "output": {head.name: f"{head.classes} scores" for head in HEADS},
}
"""Entries of a description (`number` is one of `input`) without which a model cannot be used here."""

WeightArrays = dict[str, npt.NDArray[Any]]
"""float32, but for buffers such as the number of batches of `nn.BatchNorm2d`."""


def read_model(folder: Location) -> tuple[WeightArrays, dict[str, Any]]:
    """Read a model folder, or the `model` folder of a run: the weights and the description.

    Raises:
        RequestError: there is no model, its format is another, its checksum is wrong, or a weight is not finite.
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
        weights = load_arrays(data)
        description = read_description(data)
    except (SafetensorError, ValueError) as error:
        raise RequestError(f"{folder.display}: {WEIGHTS_FILE} cannot be used: {one_line(error)}") from None
    if checksum_of(weights) != description["sha256"]:
        raise RequestError(f"{folder.display}: {WEIGHTS_FILE} is damaged (the SHA-256 of its weights differs)")
    broken = next((name for name, weight in weights.items() if not np.isfinite(weight).all()), None)
    if broken:
        raise RequestError(f"{folder.display}: {broken} holds NaN or infinite weights; train again")
    return weights, description


def read_description(data: bytes) -> dict[str, Any]:
    """The description in the header of a `model.safetensors`, which is JSON after eight bytes with its length.

    Raises:
        ValueError: there is none, or another version wrote it.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header.get("__metadata__", {}).get(HEADER_KEY, "null"))
    if not isinstance(description, dict) or description.get("format") != MODEL_FORMAT:
        raise ValueError(f"its format is not {MODEL_FORMAT!r}; train again with this version")
    for name, kind in (("sha256", str), ("epoch", int), ("parameters", int), ("input", dict)):
        if not isinstance(description.get(name), kind):
            raise ValueError(f"its {name!r} is {str(description.get(name, 'missing'))[:80]}")
    for name, expected in INTERFACE.items():
        found = (description | description["input"]).get(name)
        if found != expected:
            raise ValueError(f"its {name!r} is {shortened(str(found))}, and here {expected}; train again")
    return description


def checksum_of(weights: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} torch.{value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
