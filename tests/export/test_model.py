"""The exported model predicts as the model does, also in a program without this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mnistsum_ray import __version__, load_model, predict
from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.model import export_model
from mnistsum_ray.model.network import prepare_images

PROGRAM = """
import json, sys
import numpy, onnxruntime
rows = numpy.load("rows.npz")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
found = session.run(["pred_digit", "digit_prob", "pred_sum", "sum_prob"], dict(rows))
print(json.dumps([values.tolist() for values in found]))
"""


@pytest.mark.slow
def test_the_file_says_what_it_is_and_predicts_as_the_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    line = export_model(ExportModelConfig(model=str(model), output=str(out)), print)
    assert (line["pairs"], line["files"]) == (5000, ["model.onnx"])
    assert line["largest_difference"] < 1e-4
    file = onnx.load(str(out / "model.onnx"))
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    card = json.loads((model / "model.json").read_text())
    assert (metadata["sha256"], metadata["version"]) == (card["sha256"], __version__)

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (37, 28, 28)).astype(np.uint8)
    numbers = random.integers(0, 10, 37)
    np.savez(tmp_path / "rows.npz", image=images, number=numbers)
    command = [sys.executable, "-c", PROGRAM, str(out / "model.onnx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    digit, digit_prob, total, sum_prob = json.loads(done.stdout)
    expected = predict(load_model(str(model)), images, numbers)
    assert (digit, total) == (expected.digit.tolist(), expected.sum.tolist())
    np.testing.assert_allclose(digit_prob, expected.digit_prob, atol=1e-4)
    np.testing.assert_allclose(sum_prob, expected.sum_prob, atol=1e-4)


@pytest.mark.slow
def test_an_export_that_predicts_otherwise_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def black_on_white(images: torch.Tensor) -> torch.Tensor:
        return prepare_images(255 - images)

    monkeypatch.setattr("mnistsum_ray.export.model.prepare_images", black_on_white)
    config = ExportModelConfig(model=str(model), output=str(tmp_path / "out"))
    with pytest.raises(RunError, match=r"model\.onnx: its answers differ from the model's by up"):
        export_model(config, print)
    assert not (tmp_path / "out").exists()
