"""Exported models predict as the model does, also in a program without this package."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mnistsum_ray import __version__, load_model, predict
from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.model import export_model
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from tests.conftest import write_model

ROWS = 37


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    line = export_model(ExportModelConfig(model=str(model), output=str(folder)), print)
    assert (line["pairs"], line["files"]) == (5000, ["model.pt2", "model.onnx"])
    assert line["largest_difference"] < 1e-4
    return folder


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (ROWS, 28, 28)).astype(np.uint8), random.integers(0, 10, ROWS)


@pytest.mark.slow
def test_the_onnx_file_says_what_it_is(model: Path, exported: Path) -> None:
    file = onnx.load(str(exported / "model.onnx"))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in file.graph.input
    }
    assert shapes == {"image": ["rows", 28, 28], "number": ["rows"]}
    assert {dim.dim_param for value in file.graph.output for dim in value.type.tensor_type.shape.dim} == {"rows"}
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    description = json.loads((model / "model.json").read_text())
    assert (metadata["sha256"], metadata["parameters"], metadata["version"]) == (description["sha256"], "220125", __version__)
    assert json.loads(metadata["test"]) == description["test"]
    image = "28 x 28 grayscale, uint8, 0 background, 255 ink"
    assert metadata["input"] == f"image [rows]: {image}, not scaled; number int64[rows], 0..9"
    assert all(f"{value.name} " in metadata["output"] for value in file.graph.output)


PROGRAM = """
import json, sys
import numpy, onnxruntime, torch
rows = numpy.load("rows.npz")
images, numbers = rows["images"], rows["numbers"]
by_torch = torch.export.load(sys.argv[1] + "/model.pt2").module()(torch.from_numpy(images), torch.from_numpy(numbers))
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
names = ["pred_digit", "digit_prob", "pred_sum", "sum_prob"]
by_onnx = session.run(names, {"image": images, "number": numbers})
assert "mnistsum_ray" not in sys.modules
print(json.dumps([[value.tolist() for value in values[:4]] for values in (by_torch, by_onnx)]))
"""


@pytest.mark.slow
def test_a_program_without_this_package_predicts_as_the_model(
    model: Path, exported: Path, rows: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", images=rows[0], numbers=rows[1])
    command = [sys.executable, "-c", PROGRAM, str(exported)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = predict(load_model(str(model)), *rows)
    for digit, digit_prob, total, sum_prob in json.loads(done.stdout):
        assert (digit, total) == (expected.digit.tolist(), expected.sum.tolist())
        np.testing.assert_allclose(digit_prob, expected.digit_prob, atol=1e-4)
        np.testing.assert_allclose(sum_prob, expected.sum_prob, atol=1e-4)


@pytest.mark.slow
def test_an_export_that_predicts_otherwise_is_not_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    black_on_white: Callable[[torch.Tensor], torch.Tensor] = lambda images: prepare_images(255 - images)  # noqa: E731
    monkeypatch.setattr("mnistsum_ray.export.model.prepare_images", black_on_white)
    with pytest.raises(RunError, match=r"model.pt2: [\d,]+ of 5,000 predictions differ from the model's"):
        export_model(ExportModelConfig(model=str(model), output=str(tmp_path / "out")), print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "numbers", "said"),
    [
        (np.zeros((2, 784), np.uint8), np.zeros(2, np.int64), r"uint8\[n, 28, 28\], are uint8\[2, 784\]"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(3, np.int64), r"integers\[2\], are int64\[3\]"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(2), r"integers\[2\], are float64\[2\]"),
        (np.zeros((2, 28, 28), np.uint8), np.array([0, 10]), "0..9, are 0..10"),
    ],
)
def test_invalid_input_is_refused(images: np.ndarray, numbers: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        predict(TwoHeadCNN(), images, numbers)
