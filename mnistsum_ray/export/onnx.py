"""Export a model to ONNX, for programs without this package: from pixels to predictions."""

import json
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mnistsum_ray import __version__
from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.folder import load_model
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.inference import CPU_BATCH, predict_pairs
from mnistsum_ray.model.network import Network, prepare_images
from mnistsum_ray.storage.uri import as_request_error, empty_output, locate_existing

INPUTS: Final = ("image", "number")
OUTPUTS: Final = tuple(
    name for head in HEADS for name in (f"pred_{head.name}", f"{head.name}_prob")
)
"""Answer and probability of each head."""

_NAME: Final = "model.onnx"

_TOLERANCE: Final = 1e-3
"""Other kernels sum in another order, so probabilities differ by rounding, and answers do not."""


class ExportableModel(nn.Module):
    """From images uint8[n, 28, 28] and numbers int64[n] to OUTPUTS, int64[n] and float32[n]."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for scores in self.model(prepare_images(image), number):
            probability, answer = scores.softmax(1).max(1)
            outputs += [answer, probability]
        return tuple(outputs)


def export_onnx(model: Network, description: dict[str, Any]) -> bytes:
    """An ONNX file of ExportableModel; its metadata are the entries of model.json."""
    rows = torch.export.Dim("rows")
    converted = torch.onnx.export(
        ExportableModel(model).eval(),
        (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamic_shapes={name: {0: rows} for name in INPUTS},
        dynamo=True,
        verbose=False,
    )
    assert converted
    proto = converted.model_proto
    for key, value in ({"version": __version__} | description).items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=key, value=text)
    return bytes(proto.SerializeToString())


def export_model(config: ExportModelConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Export a model, if the file's answers in ONNX Runtime are the model's; return the last line.

    Raises:
        RequestError: the model does not exist, or the output is not an empty folder.
        RunError: the exported model answers otherwise than the model.
    """
    import onnxruntime  # of the extra onnx

    output = empty_output(config.output)
    model, description = load_model(locate_existing(config.model, "--model"))
    say("exporting")
    data = export_onnx(model, description)
    source = open_source("sample")  # its test images, each with every number
    block = next(source.groups[0].blocks())  # all of it
    images = block.images[source.test].repeat(NUMBERS, axis=0)
    numbers = np.arange(len(images)) % NUMBERS
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = session.run(OUTPUTS, {"image": images, "number": numbers})
    expected = predict_pairs(model, images, numbers, CPU_BATCH)
    columns = zip(OUTPUTS, found, strict=True)
    difference = float(np.abs([values - expected[name] for name, values in columns]).max())
    if not difference <= _TOLERANCE:  # `not <=` also catches NaN
        problem = f"its answers differ from the model's by up to {difference:.2g}"
        raise RunError(f"{_NAME}: {problem}; nothing was written")
    with as_request_error("--output"):
        (output / _NAME).write(data)
    say(f"{_NAME}: {len(data):,} bytes, the model's answers on {len(numbers):,} pairs")
    fields = {"files": [_NAME], "pairs": len(numbers), "largest_difference": difference}
    return {"output": output.display} | fields
