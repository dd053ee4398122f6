"""Export a model to `torch.export` and ONNX, for programs without this package: from pixels to predictions."""

import io
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, RunError, one_line
from mnistsum_ray.model.exporting import INPUTS, OUTPUTS, export_onnx, export_torch
from mnistsum_ray.model.inference import CPU_BATCH, Predictions, predict_pairs
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.storage.paths import locate_empty_output, locate_existing

TORCH_FILE: Final = "model.pt2"
ONNX_FILE: Final = "model.onnx"

_PROBABILITY_TOLERANCE: Final = 1e-3
"""Other kernels sum in another order, so probabilities differ by rounding."""

PredictFunction = Callable[[Pixels, npt.NDArray[np.int64]], tuple[npt.NDArray[Any], ...]]
"""Images and numbers to OUTPUTS."""


def export_model(config: ExportModelConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Export a model to both formats, load each file again, compare its predictions with the model's, and write the files.

    Returns:
        The fields of the job's last line: `output`; `files`; `pairs`, the number of compared pairs; `largest_difference` of a
        probability from the model's.

    Raises:
        RequestError: the model does not exist, or the output is not an empty folder.
        RunError: an exported model predicts otherwise than the model.
    """
    output = locate_empty_output(config.output)
    model, _ = load_model(locate_existing(config.model, "--model"))
    try:
        say("exporting")
        program = export_torch(model)
        exported = {TORCH_FILE: program, ONNX_FILE: export_onnx(program)}
        images, numbers = _sample_pairs()
        expected = predict_pairs(model, images, numbers, CPU_BATCH)
        largest = 0.0
        for (name, data), load in zip(exported.items(), (_load_torch, _load_onnx), strict=True):
            largest = max(largest, _compare(name, load(data)(images, numbers), expected))
            say(f"{name}: {len(data):,} bytes, the same predictions as the model's on {len(numbers):,} pairs")
        for name, data in exported.items():
            (output / name).write_bytes(data)
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    return {"output": output.display, "files": list(exported), "pairs": len(numbers), "largest_difference": largest}


def _sample_pairs() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Test images of the bundled sample, each with every number."""
    source = open_source("sample")
    images, _ = source.data.fetch(source.test.ids())
    return images.repeat(NUMBERS, axis=0), np.tile(np.arange(NUMBERS), len(images))


def _load_torch(data: bytes) -> PredictFunction:
    module = torch.export.load(io.BytesIO(data)).module()

    def predict(images: Pixels, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
        with torch.no_grad():
            return tuple(value.numpy() for value in module(torch.from_numpy(images), torch.from_numpy(numbers)))

    return predict


def _load_onnx(data: bytes) -> PredictFunction:
    import onnxruntime  # part of the extra onnx

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images, numbers: tuple(session.run(OUTPUTS, dict(zip(INPUTS, (images, numbers), strict=True))))


def _compare(name: str, found: tuple[npt.NDArray[Any], ...], expected: Predictions) -> float:
    """The largest difference of a probability; raises RunError if a prediction differs."""
    pairs = [(name, values, expected.values[name]) for name, values in zip(OUTPUTS, found, strict=True)]
    difference = max(np.abs(values - theirs).max() for name, values, theirs in pairs if name.endswith("_prob"))
    wrong = int(np.any([values != theirs for name, values, theirs in pairs if name.startswith("pred_")], axis=0).sum())
    if wrong or not difference <= _PROBABILITY_TOLERANCE:  # `not <=` also catches NaN
        raise RunError(
            f"{name}: {wrong:,} of {len(found[0]):,} predictions differ from the model's, probabilities by up to "
            f"{difference:.2g}; nothing was written"
        )
    return float(difference)
