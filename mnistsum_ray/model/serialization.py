"""Model folders: `model.safetensors` holds the weights, and `model.json`, the model card, describes the model."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.evaluation import Metrics
from mnistsum_ray.model.network import PARAMETERS, PIXEL_MEAN, PIXEL_STD, TwoHeadCNN
from mnistsum_ray.storage.location import Location

MODEL_FORMAT: Final = "mnistsum_ray/3"
"""Format of a model folder. 2 added the temperatures, 3 the consistency to the metrics."""
MODEL_FILES: Final = ("model.safetensors", "model.json")

Weights = dict[str, Tensor]


def copy_weights(model: TwoHeadCNN) -> Weights:
    """A copy of the weights on the CPU, float32, contiguous."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def save_model(
    folder: Path, weights: Weights, *, epoch: int, validation: Metrics, test: Metrics, sum_head: dict[str, Any] | None = None
) -> None:
    """Write a model folder on the local disk; `sum_head` is the card's entry on the fine-tuning of the sum head."""
    data = save_tensors(weights)
    card = {
        "format": MODEL_FORMAT,
        "network": "TwoHeadCNN",
        "parameters": PARAMETERS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {
            "image": "28 x 28 grayscale, uint8, 0 background, 255 ink",
            "scaled": "(image / 255 - mean) / std",
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "number": "0..9",
        },
        "output": {"digit": "10 scores", "sum": "19 scores: digit + number is 0..18"},
        "epoch": epoch,
        "sum_head": sum_head,
        "temperature": Temperatures().as_json(),
        "validation": asdict(validation),
        "test": asdict(test),
    }
    weights_file, card_file = MODEL_FILES
    (folder / weights_file).write_bytes(data)
    (folder / card_file).write_text(json.dumps(card, indent=2) + "\n")


def load_model(folder: Location) -> tuple[TwoHeadCNN, dict[str, Any]]:
    """Load a model folder, or the `model` folder of a run: the network in evaluation mode, and the model card.

    Raises:
        RequestError: there is no model, its format or network is another, its checksum differs from the card's, or a weight is
            not finite.
    """
    weights_file, card_file = MODEL_FILES
    try:
        if not (folder / card_file).exists():
            folder = folder / "model"
        card = (folder / card_file).read_json()
        data = (folder / weights_file).read_bytes()
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder.display}: holds no model ({one_line(error)})") from None
    try:
        temperatures = _check_card(card)
    except ValueError as error:
        raise RequestError(f"{folder.display}: model.json cannot be used: {error}") from None
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise RequestError(f"{folder.display}: model.safetensors is not the file that model.json describes (SHA-256 differs)")
    model = TwoHeadCNN()
    try:
        model.load_state_dict(load_tensors(data))
    except (SafetensorError, RuntimeError) as error:
        raise RequestError(f"{folder.display}: its tensors are not those of the network ({one_line(error)})") from None
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise RequestError(f"{folder.display}: {broken} holds NaN or infinite weights; train again")
    model.temperatures = temperatures
    return model.eval(), card


def _check_card(card: Any) -> Temperatures:
    """Check the fields that are used, and return the temperatures.

    Raises:
        ValueError: a field is missing or has the wrong type; the message names the field.
    """
    if not isinstance(card, dict) or card.get("format") != MODEL_FORMAT:
        raise ValueError(f"its format is not {MODEL_FORMAT!r}; train again with this version")
    for name, kind in (("sha256", str), ("epoch", int), ("parameters", int)):
        if not isinstance(card.get(name), kind):
            raise ValueError(f"its {name!r} is {str(card.get(name, 'missing'))[:80]}")
    return Temperatures.from_json(card.get("temperature"))
