"""A fork of the package, in which an engineer has changed some lines, run as a user runs it: another network, a third question
and a wider range of numbers. Every job follows, and no other file is changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mnistsum_ray import RequestError, load_model
from mnistsum_ray.data.order import NUMBERS
from tests.integration.conftest import ROOT, Done, run_job

pytestmark = pytest.mark.slow

NETWORK = '''class SmallNet(Network):
    """Strided convolutions, batch normalization everywhere, and no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 6 * 6, DIGIT.classes),
        )
        self.head = nn.Sequential(
            nn.Linear(DIGIT.classes + NUMBERS, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, SUM.classes)
        )
        self.even = nn.Linear(DIGIT.classes, 2)

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        return self.body(images)

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        sums = self.head(torch.cat([digit_scores, self.one_hot[numbers].to(digit_scores.dtype)], dim=1))
        return digit_scores, sums, self.even(digit_scores)


def make_network() -> Network:
'''
_LAYER = "        self.fc2 = nn.Linear(128, SUM.classes)\n"
_SCORES = "return digit_scores, self.fc2(F.relu(self.fc1(torch.cat([digit_scores, one_hot], dim=1))))"
EDITS = [
    ("data/order.py", f"NUMBERS: Final = {NUMBERS}\n", f"NUMBERS: Final = {2 * NUMBERS}\n"),
    ("model/heads.py", "(DIGIT, SUM)", '(DIGIT, SUM, Head("even", 2, lambda digits, numbers: digits % 2 == 0))'),
    ("model/network.py", _LAYER, f"{_LAYER}        self.fc3 = nn.Linear(DIGIT.classes, 2)\n"),
    ("model/network.py", _SCORES, f"{_SCORES}, self.fc3(digit_scores)"),
    ("model/heads.py", 'NETWORK: Final = "TwoHeadCNN"', 'NETWORK: Final = "SmallNet"'),
    ("model/network.py", "def make_network() -> Network:\n", NETWORK),
]
"""A file of the package, a text that it holds exactly once, and the new text."""

TEST_ROWS, SUMS = 500, 9 + 2 * NUMBERS
PARAMETERS = 16 * 25 + 2 * 16 + 32 * 16 * 9 + 2 * 32 + 1153 * 10 + (11 + 2 * NUMBERS) * 64 + 2 * 64 + 65 * SUMS + 11 * 2
# The last batch of 4,000 rows has one row: a worker gets it, another none, and neither has the statistics of a batch.
BATCH, STEPS = 43, 94


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options with which `run_job` runs the jobs of the fork."""
    folder = tmp_path_factory.mktemp("fork")
    shutil.copytree(ROOT / "mnistsum_ray", folder / "mnistsum_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in EDITS:
        path = folder / "mnistsum_ray" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
    return {"cwd": folder, "env": {"PYTHONPATH": str(folder)}}


@pytest.fixture(scope="module")
def trained(forked: dict[str, Any]) -> Done:
    flags = ("--data", "sample", "--epochs", 1, "--batch-size", BATCH, "--num-workers", 2, "--sum-head-steps", 300)
    return run_job("train", *flags, "--precision", "fp32", "--name", "one", **forked)


def test_it_is_trained_by_two_workers_and_its_buffers_are_in_the_model(trained: Done) -> None:
    assert trained.line["parameters"] == PARAMETERS
    folder = Path(trained.line["model"])
    card, tensors = json.loads((folder / "model.json").read_text()), load_file(folder / "model.safetensors")
    assert (card["network"], card["parameters"]) == ("SmallNet", PARAMETERS)
    assert "int8" not in card
    assert tensors["body.1.num_batches_tracked"] == tensors["head.1.num_batches_tracked"] == STEPS - 1
    assert all(np.isfinite(value).all() and value.any() for value in tensors.values())
    assert trained.line["test"]["digit_accuracy"] > 0.8
    assert min(trained.line["test"][name] for name in ("sum_accuracy", "even_accuracy")) > 0.6
    with pytest.raises(RequestError, match="its 'network' is SmallNet, and here TwoHeadCNN"):
        load_model(str(folder))


def test_training_evaluates_calibrates_and_draws_the_third_head(trained: Done) -> None:
    test, run = trained.line["test"], Path(trained.line["run"])
    assert test["pairs"] == 2 * NUMBERS * TEST_ROWS
    manifest, card = (json.loads((run / name).read_text()) for name in ("manifest.json", "model/model.json"))
    assert manifest["metrics"]["test"]["even_accuracy"] == card["test"]["even_accuracy"] == test["even_accuracy"]
    analysis = manifest["error_analysis"]
    assert all(type(mistake["pred_even"]) is bool and mistake["even_prob"] >= 0.5 for mistake in analysis["mistakes"])
    assert {len(line) for line in analysis["sums_right"]} == {2 * NUMBERS}
    assert all("even_accuracy" in json.loads(line)["validation"] for line in (run / "history.jsonl").read_text().splitlines())
    words = f"{100 * test['even_accuracy']:.2f} %"
    assert f"all {2 * NUMBERS} numbers)" in trained.err
    assert f"even {words} ({TEST_ROWS} rows" in trained.err
    page, readme = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    assert f"<b>{words}</b> even correct" in page
    assert f"| even accuracy | {words} |" in readme
    for text in (page, readme):
        assert f"a number 0-{2 * NUMBERS - 1}" in text
        assert "predicts digit, sum, even" in text


_PREDICT = """
import json, pyarrow.parquet as pq, torch
from PIL import Image
from mnistsum_ray import RequestError, ScoreConfig, load_model, predict, predict_rows
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.scoring.preflight import preflight
model, rows = load_model("runs/one"), pq.read_table("in/part-00000.parquet").drop_columns(["digit"])
found = predict(model, pixels_view(one_chunk(rows["image"])), rows["number"].to_numpy())
added = predict_rows(model, rows)
product = TwoHeadCNN()(torch.zeros(2, 1, 28, 28), torch.tensor([3, 19]))
try:
    preflight(ScoreConfig(model="runs/one", input=("in",), output="out8", precision="int8"))
except RequestError as error:
    print(error)
print(json.dumps({
    "the same": found.even.tolist() == added["pred_even"].to_pylist(),
    "types": [str(found.even.dtype), str(found.even_prob.dtype)],
    "classes": [scores.shape[1] for scores in product],
}))
predict(model, Image.new("L", (28, 28)), 20)
"""


def test_scoring_answers_it_as_the_calibrated_model(trained: Done, forked: dict[str, Any]) -> None:
    """Each test image once, with a number of the wider range. The images were evaluated by both workers, half by each: had one
    other buffers than the model, it would answer otherwise."""
    run_job("export_pairs", "--data", "sample", "--output", "in", "--rows", TEST_ROWS, "--files", 1, **forked)
    flags = ("--model", "runs/one", "--label-column", "digit", "--precision", "fp32", "--num-workers", 1)
    line = run_job("score", *flags, "--input", "in", "--output", "out", **forked).line
    table = pq.read_table(forked["cwd"] / "out" / "predictions" / "part-00000.parquet")
    assert max(table["number"].to_pylist()) >= NUMBERS
    added = ("pred_digit", "digit_prob", "pred_sum", "sum_prob", "pred_even", "even_prob", "consistent")
    assert tuple(table.column_names[-len(added) :]) == added
    assert table.schema.field("pred_even").type == pa.bool_()
    right = table["pred_even"].to_numpy() == (table["digit"].to_numpy() % 2 == 0)
    assert line["even_accuracy"] == right.mean() == trained.line["test"]["even_accuracy"]
    assert line["digit_accuracy"] == trained.line["test"]["digit_accuracy"]
    scored, card = (json.loads((forked["cwd"] / name).read_text()) for name in ("out/manifest.json", "runs/one/model/model.json"))
    assert scored["probabilities"]["even"]["nll"] == pytest.approx(card["probabilities"]["even"]["nll"], abs=1e-4)
    assert f"even correct, of {TEST_ROWS} labelled rows" in (forked["cwd"] / "out" / "report.html").read_text()
    command = [sys.executable, "-c", _PREDICT]
    done = subprocess.run(command, cwd=forked["cwd"], env=os.environ | forked["env"], capture_output=True, text=True)
    refused, result = done.stdout.splitlines()
    assert refused.startswith("--precision int8: the model holds no calibration")
    assert json.loads(result) == {"the same": True, "types": ["bool", "float32"], "classes": [10, SUMS, 2]}
    assert done.stderr.endswith("RequestError: the number is 20, not one of 0..19\n")


def test_a_picture_is_answered_and_the_model_is_exported(trained: Done, forked: dict[str, Any], sample: pa.Table) -> None:
    pixels = np.frombuffer(sample["image"][0].as_py(), np.uint8).reshape(28, 28)
    Image.fromarray(pixels).save(forked["cwd"] / "digit.png")
    number = NUMBERS + 5
    answer = run_job("predict", "digit.png", "--model", trained.line["run"], "--number", number, **forked)
    line = answer.line
    assert (line["digit"], line["number"], type(line["even"])) == (sample["digit"][0].as_py(), number, bool)
    assert f", digit + {number}: {line['sum']} (" in answer.err
    assert f", even: {line['even']} ({100 * line['even_prob']:.2f} %)" in answer.err
    exported = run_job("export_model", "--model", "runs/one", "--output", "exported", **forked).line
    assert exported["pairs"] == 2 * NUMBERS * 500
    assert exported["largest_difference"] < 1e-4
