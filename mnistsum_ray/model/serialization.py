"""Write model folders, and load them as networks; `folder` reads them without PyTorch."""

import json
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnistsum_ray.errors import RequestError, one_line, shortened
from mnistsum_ray.model.folder import DESCRIPTION_FILE, HEADER_KEY, INTERFACE, MODEL_FORMAT, WEIGHTS_FILE, checksum_of, read_model
from mnistsum_ray.model.heads import NETWORK
from mnistsum_ray.model.network import PIXEL_MEAN, PIXEL_STD, Network, make_network
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location

Weights = dict[str, Tensor]


def copy_weights(model: Network) -> Weights:
    """A copy of the weights on the CPU, float32, contiguous; and of buffers that training changes, of any type."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def describe_model(
    weights: Weights, *, epoch: int, metrics: dict[str, Any], sum_head: dict[str, Any] | None = None, background: int = 0
) -> dict[str, Any]:
    """The description of weights: the epoch that they are from, `Metrics` by split, an entry on the fine-tuning, and the
    brightness of the background, 0 or 255, of the images that they were trained on."""
    return {
        "format": MODEL_FORMAT,
        "network": INTERFACE["network"],
        "parameters": sum(parameter.numel() for parameter in make_network().parameters()),
        "sha256": checksum(weights),
        "input": {
            "image": f"28 x 28 grayscale, uint8, {background} background, {255 - background} ink",
            "background": background,
            "scaled": "(image / 255 - mean) / std",
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "number": INTERFACE["number"],
        },
        "output": INTERFACE["output"],
        "epoch": epoch,
        "sum_head": sum_head,
        **metrics,
    }


def save_model(folder: OutputFolder, weights: Weights, description: dict[str, Any]) -> None:
    """Write a model folder. The weights come last, and while they are not there, there is no model."""
    folder.write(DESCRIPTION_FILE, description)
    folder.write(WEIGHTS_FILE, save_tensors(weights, {HEADER_KEY: json.dumps(description, allow_nan=False)}))


def load_model(folder: Location) -> tuple[Network, dict[str, Any]]:
    """Load a model folder, or the `model` folder of a run: the network in evaluation mode, and the description.

    Raises:
        RequestError: as `read_model`; or its tensors are not those of the network.
    """
    weights, description = read_model(folder)
    model = make_network()
    try:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    except RuntimeError as error:
        differ = shortened(one_line(error).partition(": ")[2])
        raise RequestError(f"{folder.display}: its tensors are not those of the network {NETWORK} ({differ})") from None
    model.background = 255 if description["input"].get("background") else 0  # of a model before this entry: MNIST's
    return model.eval(), description


def checksum(weights: Weights) -> str:
    """SHA-256 over the names, shapes and values of all weights."""
    return checksum_of({name: value.numpy() for name, value in weights.items()})
