"""An export is checked before it is written. What it answers: integration/test_recipes.py."""

import json
from pathlib import Path

import onnx
import pytest

from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.errors import RunError
from mnistsum_ray.export.onnx import export_model
from mnistsum_ray.model.network import prepare_images


@pytest.mark.slow
def test_an_export_that_predicts_otherwise_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes has the entries of model.json."""
    export_model(ExportModelConfig(model=str(model), output=str(tmp_path)), print)
    entries = onnx.load(str(tmp_path / "model.onnx")).metadata_props
    sha256 = json.loads((model / "model.json").read_text())["sha256"]
    assert sha256 in [entry.value for entry in entries if entry.key == "sha256"]
    module = "mnistsum_ray.export.onnx.prepare_images"
    monkeypatch.setattr(module, lambda images: prepare_images(255 - images))
    config = ExportModelConfig(model=str(model), output=str(tmp_path / "out"))
    with pytest.raises(RunError, match=r"model\.onnx: its answers differ from the model's by up"):
        export_model(config, print)
    assert not (tmp_path / "out").exists()
