"""Export a model to `torch.export` and ONNX, for programs without this package: from pixels to predictions."""

import io
import json
import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnistsum_ray import __version__
from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.heads import HEADS, PREDICTION_FIELDS
from mnistsum_ray.model.inference import CPU_BATCH, Predictions, predict_pairs
from mnistsum_ray.model.network import Network, prepare_images
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.storage.folder import empty_output
from mnistsum_ray.storage.paths import locate_existing, refused

INPUTS: Final = ("image", "number")
OUTPUTS: Final = tuple(PREDICTION_FIELDS.names[:-1])
"""Answer and probability of each head."""

_PROBABILITY_TOLERANCE: Final = 1e-3
"""Other kernels sum in another order, so probabilities differ by rounding."""

Arrays = tuple[npt.NDArray[Any], ...]


class ExportableModel(nn.Module):
    """Model with preprocessing and softmax: images uint8[n, 28, 28] and numbers int64[n] to OUTPUTS, int64[n] and float32[n]."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for scores in self.model(prepare_images(image), number):
            probability, answer = scores.softmax(1).max(1)
            outputs += [answer, probability]
        return tuple(outputs)


def export_torch(model: Network) -> bytes:
    """A `.pt2` file of ExportableModel, for `torch.export.load`; `model` is in evaluation mode, on the CPU."""
    rows = torch.export.Dim("rows")
    example = (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    program = torch.export.export(ExportableModel(model), example, dynamic_shapes={name: {0: rows} for name in INPUTS})
    file = io.BytesIO()
    with warnings.catch_warnings():
        # PyTorch warns that channels-last weights may be saved incompletely; they are saved whole.
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
    return file.getvalue()


def export_onnx(program: bytes, card: dict[str, Any]) -> bytes:
    """An ONNX file of what `export_torch` returns, with the entries of `card`, model.json, as metadata. Needs the extra onnx."""
    with quiet_logger("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside PyTorch's own exporter
        converted = torch.onnx.export(
            torch.export.load(io.BytesIO(program)),
            input_names=INPUTS,
            output_names=OUTPUTS,
            # A program that was loaded has lost the name.
            dynamic_shapes={name: {0: torch.export.Dim("rows")} for name in INPUTS},
            dynamo=True,
            verbose=False,
        )
    assert converted is not None
    proto = converted.model_proto
    # For a person who is given the file alone: which model it is, what goes in and comes out, and how good it is.
    tensors = {
        "input": f"image [rows]: {card['input']['image']}, not scaled; number int64[rows], {card['input']['number']}",
        "output": "; ".join(f"pred_{head.name} int64[rows], {head.name}_prob float32[rows]" for head in HEADS),
    }
    for key, value in ({"version": __version__} | card | tensors).items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    data: bytes = proto.SerializeToString()
    return data


def export_model(config: ExportModelConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Export a model to both formats, load each file again, compare its predictions with the model's, and write the files.

    Returns the fields of the job's last line; `pairs` is the number of those compared, `largest_difference` of a probability.

    Raises:
        RequestError: the model does not exist, or the output is not an empty folder.
        RunError: an exported model predicts otherwise than the model.
    """
    output = empty_output(config.output)
    model, card = load_model(locate_existing(config.model, "--model"))
    source = open_source("sample")  # its test images, each with every number
    images = source.data.fetch(source.test.ids())[0].repeat(NUMBERS, axis=0)
    numbers = np.arange(len(images)) % NUMBERS
    expected = predict_pairs(model, images, numbers, CPU_BATCH)
    say("exporting")
    program = export_torch(model)
    exported = {"model.pt2": program, "model.onnx": export_onnx(program, card)}
    differences = []
    for (name, data), predicted_by in zip(exported.items(), (_run_torch, _run_onnx), strict=True):
        differences.append(_compare(name, predicted_by(data, images, numbers), expected))
    with refused("--output"):
        for name, data in exported.items():
            output.write(name, data)
            say(f"{name}: {len(data):,} bytes, the same predictions as the model's on {len(numbers):,} pairs")
    largest = max(differences)
    return {"output": output.place.display, "files": list(exported), "pairs": len(numbers), "largest_difference": largest}


def _run_torch(data: bytes, *inputs: npt.NDArray[Any]) -> Arrays:
    with torch.no_grad():
        return tuple(value.numpy() for value in torch.export.load(io.BytesIO(data)).module()(*map(torch.from_numpy, inputs)))


def _run_onnx(data: bytes, *inputs: npt.NDArray[Any]) -> Arrays:
    import onnxruntime  # part of the extra onnx

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return tuple(session.run(OUTPUTS, dict(zip(INPUTS, inputs, strict=True))))


def _compare(name: str, found: Arrays, expected: Predictions) -> float:
    """The largest difference of a probability; raises RunError if a prediction differs."""
    differences = np.abs([values - expected.values[column] for column, values in zip(OUTPUTS, found, strict=True)])
    wrong = differences[::2].any(0).sum()  # predictions and their probabilities take turns
    largest = float(differences[1::2].max())
    if wrong or not largest <= _PROBABILITY_TOLERANCE:  # `not <=` also catches NaN
        raise RunError(
            f"{name}: {wrong:,} of {len(found[0]):,} predictions differ from the model's, probabilities by up to {largest:.2g}; "
            "nothing was written"
        )
    return largest
