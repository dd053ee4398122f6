"""The model for programs that know nothing of this project: `torch.export` and ONNX, from pixels to answers. Nothing of Ray."""

import io
import logging
import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.data.decoding import Pixels, one_chunk, pixels_view
from mnistsum_ray.data.parquet_parts import read_whole
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, RunError, one_line
from mnistsum_ray.model.inference import CPU_BATCH, Predictions, predict_pairs
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.storage.location import empty_folder, locate_existing

TORCH_FILE: Final = "model.pt2"
ONNX_FILE: Final = "model.onnx"

INPUTS: Final = ("image", "number")
OUTPUTS: Final = ("pred_digit", "digit_prob", "pred_sum", "sum_prob")

_PROBABILITY_TOLERANCE: Final = 1e-3
"""Other kernels add up in another order."""

Answers = Callable[[Pixels, npt.NDArray[np.int64]], tuple[npt.NDArray[Any], ...]]


class ExportableModel(nn.Module):
    """Pixels uint8[n, 28, 28] and numbers int64[n] to OUTPUTS: int64[n] and float32[n] of each head, named as in scored files."""

    def __init__(self, model: TwoHeadCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digit_scores, sum_scores = self.model(prepare_images(image), number)
        digit_prob, digit = (digit_scores / self.model.temperatures.digit).softmax(1).max(1)
        sum_prob, total = (sum_scores / self.model.temperatures.sum).softmax(1).max(1)
        return digit, digit_prob, total, sum_prob


def export_model(config: ExportModelConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Write both files, and read each again to check it.

    Returns:
        The fields of the job's last line: `output`, `files`, `pairs` that were compared, and the `largest_difference` of a
        probability from that of the model.

    Raises:
        RequestError: there is no such model, or the output is not an empty folder.
        RunError: an exported model answers otherwise than the model.
    """
    output = empty_folder(config.output)
    model, _ = load_model(locate_existing(config.model, "--model"))
    try:
        say("exporting")
        exported = {TORCH_FILE: (program := _exported(ExportableModel(model))), ONNX_FILE: _as_onnx(program)}
        images, numbers = _pairs()
        expected = predict_pairs(model, images, numbers, CPU_BATCH)
        largest = 0.0
        for (name, data), opened in zip(exported.items(), (_open_torch, _open_onnx), strict=True):
            largest = max(largest, _compare(name, opened(data)(images, numbers), expected))
            say(f"{name}: {len(data):,} bytes, the same answers as the model on {len(numbers):,} pairs")
        for name, data in exported.items():
            (output / name).write_bytes(data)
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    return {"output": output.display, "files": list(exported), "pairs": len(numbers), "largest_difference": largest}


def _exported(model: ExportableModel) -> bytes:
    rows = torch.export.Dim("rows")
    example = (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    program = torch.export.export(model, example, dynamic_shapes={name: {0: rows} for name in INPUTS})
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that lie channels last are saved whole, whatever it says
        torch.export.save(program, file)
    return file.getvalue()


def _as_onnx(program: bytes) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own
        converted = torch.onnx.export(
            torch.export.load(io.BytesIO(program)), input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False
        )
    assert converted is not None
    data: bytes = converted.model_proto.SerializeToString()
    return data


def _pairs() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """The bundled sample's test images, each with all ten numbers."""
    source = open_source("sample")
    (part,) = source.parts
    table = read_whole(part).take(source.test)
    return pixels_view(one_chunk(table["image"])).repeat(10, axis=0), np.tile(np.arange(10), len(source.test))


def _open_torch(data: bytes) -> Answers:
    module = torch.export.load(io.BytesIO(data)).module()

    def answers(images: Pixels, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
        with torch.no_grad():
            return tuple(value.numpy() for value in module(torch.from_numpy(images), torch.from_numpy(numbers)))

    return answers


def _open_onnx(data: bytes) -> Answers:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images, numbers: tuple(session.run(OUTPUTS, dict(zip(INPUTS, (images, numbers), strict=True))))


def _compare(name: str, found: tuple[npt.NDArray[Any], ...], expected: Predictions) -> float:
    """The largest difference of a probability."""
    digit, digit_prob, total, sum_prob = found
    difference = max(np.abs(digit_prob - expected.digit_prob).max(), np.abs(sum_prob - expected.sum_prob).max())
    wrong = int(((digit != expected.digit) | (total != expected.sum)).sum())
    if wrong or not difference <= _PROBABILITY_TOLERANCE:
        raise RunError(
            f"{name}: {wrong:,} of {len(digit):,} answers are not the model's, probabilities differ by up to {difference:.2g}; "
            "nothing was written"
        )
    return float(difference)
