"""The exported model predicts as the model does, also in a program without this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mnistsum_ray import load_model, predict
from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.onnx import export_model
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
    assert metadata["sha256"] == json.loads((model / "model.json").read_text())["sha256"]

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (37, 28, 28)).astype(np.uint8)
    numbers = random.integers(0, 10, 37)
    np.savez(tmp_path / "rows.npz", image=images, number=numbers)
    command = [sys.executable, "-c", PROGRAM, str(out / "model.onnx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = vars(predict(load_model(str(model)), images, numbers))
    names = ("digit", "digit_prob", "sum", "sum_prob")
    for name, found in zip(names, json.loads(done.stdout), strict=True):
        np.testing.assert_allclose(found, expected[name], atol=1e-4)


@pytest.mark.slow
def test_an_export_that_predicts_otherwise_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "mnistsum_ray.export.onnx.prepare_images"
    monkeypatch.setattr(module, lambda images: prepare_images(255 - images))
    config = ExportModelConfig(model=str(model), output=str(tmp_path / "out"))
    with pytest.raises(RunError, match=r"model\.onnx: its answers differ from the model's by up"):
        export_model(config, print)
    assert not (tmp_path / "out").exists()
