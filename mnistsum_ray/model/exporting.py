"""The network as torch.export and ONNX programs, from pixels to predictions."""

import io
import warnings
from typing import Final

import torch
from torch import Tensor, nn

from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.overrides import quiet_logger

INPUTS: Final = ("image", "number")
OUTPUTS: Final = tuple(PREDICTION_FIELDS.names[:-1])
"""Answer and probability of each head."""


class ExportableModel(nn.Module):
    """Model with preprocessing and softmax: images uint8[n, 28, 28] and numbers int64[n] to OUTPUTS.

    The predictions are int64[n] and their probabilities float32[n], as in scored files.
    """

    def __init__(self, model: TwoHeadCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for scores in self.model(prepare_images(image), number):
            probability, answer = scores.softmax(1).max(1)
            outputs += [answer, probability]
        return tuple(outputs)


def export_torch(model: TwoHeadCNN) -> bytes:
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


def export_onnx(program: bytes) -> bytes:
    """An ONNX file of what `export_torch` returns. Needs the packages onnx and onnxscript."""
    with quiet_logger("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside PyTorch's own exporter
        converted = torch.onnx.export(
            torch.export.load(io.BytesIO(program)), input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False
        )
    assert converted is not None
    data: bytes = converted.model_proto.SerializeToString()
    return data
