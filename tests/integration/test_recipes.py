"""The blocks of .readme/recipes.md run as they stand."""

import json
import shutil
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import serve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnistsum_ray.config import ExportModelConfig
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.export.onnx import export_model
from tests.conftest import plain_predictions, write_sample
from tests.jobs import ROOT, free_port, history_of

pytestmark = pytest.mark.slow

RECIPES = (ROOT / ".readme" / "recipes.md").read_text()


@pytest.fixture
def folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the run runs/mine."""
    shutil.copytree(model, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_recipe(title: str, *changes: tuple[str, str]) -> dict[str, Any]:
    """Run the block under a title, in which texts are replaced by others; return its names."""
    section = RECIPES.partition(f"**{title}")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    for written, other in changes:
        assert written in code
        code = code.replace(written, other)
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, title, "exec"), names)
    return names


def test_onnx_runtime_and_plain_pytorch_give_the_same_answers(folder: Path, pixels: Pixels) -> None:
    export_model(ExportModelConfig(model="runs/mine", output="exported"), print)
    onnx = run_recipe("ONNX Runtime")
    torch_logits = run_recipe("Plain PyTorch")["sum_logits"]
    expected = plain_predictions(folder / "runs" / "mine", onnx["images"], onnx["numbers"])
    assert onnx["pred_digit"].tolist() == expected["pred_digit"].tolist()
    assert onnx["pred_sum"].tolist() == torch_logits.argmax(1).tolist()
    assert np.allclose(onnx["sum_prob"], torch_logits.softmax(1).max(1).values, atol=1e-3)
    digits, numbers = pixels[::500], np.arange(10)  # the images of the recipes are black
    pred_digit, _, pred_sum, _ = onnx["session"].run(None, {"image": digits, "number": numbers})
    expected = plain_predictions(folder / "runs" / "mine", digits, numbers)
    assert pred_digit.tolist() == expected["pred_digit"].tolist()
    assert pred_sum.tolist() == expected["pred_sum"].tolist()


def test_pictures_become_rows(folder: Path) -> None:
    write_picture(folder / "seven.png")
    (folder / "photos.csv").write_text("file,number\nseven.png,5\n")
    run_recipe("Your own pictures")
    (row,) = pq.read_table("photos.parquet").to_pylist()
    assert (len(row["image"]), row["number"]) == (784, 5)


def test_ray_serve_answers_for_a_picture(cluster: str, folder: Path) -> None:
    write_picture(folder / "seven.png")
    # A replica has another current folder.
    recipe = run_recipe("Ray Serve", ("runs/mine", str(folder / "runs" / "mine")))
    port = free_port()
    serve.start(http_options={"port": port})
    try:
        serve.run(recipe["app"])
        picture = (folder / "seven.png").read_bytes()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/?number=5", picture) as answer:
            assert set(json.load(answer)) == {"digit", "sum", "unsure"}
    finally:
        serve.shutdown()


def test_ray_tune_finds_the_best_trial(cluster: str, folder: Path) -> None:
    results = run_recipe("Ray Tune", few_rows(folder), ("[0.02, 0.05]", "[0.02]"))["results"]
    assert not results.errors
    assert len(results) == 1


def test_tensorboard_shows_each_epoch(cluster: str, folder: Path) -> None:
    trained = run_recipe("TensorBoard", few_rows(folder))["trained"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    expected: dict[str, dict[int, float]] = defaultdict(dict)
    for line in history_of(trained.run):
        expected["train/loss"][line["epoch"]] = line["train_loss"]
        for split in ("validation", "test"):
            for name, value in line[split].items():
                expected[f"{split}/{name}"][line["epoch"]] = value
    assert set(events.Tags()["scalars"]) == expected.keys()
    for tag, values in expected.items():
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(values)


def few_rows(folder: Path) -> tuple[str, str]:
    """Replaces the sample in a recipe by a tenth of it."""
    rows = write_sample(folder / "rows.parquet", 500)
    return 'data="sample"', f'data="{rows}", sum_head_steps=5'


def write_picture(file: Path) -> None:
    """A dark seven on a light background, 100 x 100."""
    pixels = np.full((100, 100), 255, np.uint8)
    pixels[20:28, 30:70] = 0
    pixels[28:80, 62:70] = 0
    Image.fromarray(pixels).save(file)
