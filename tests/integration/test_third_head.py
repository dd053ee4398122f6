"""A third question and a wider range of numbers, in a fork of the package: every job follows, and no other file is changed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from mnistsum_ray.data.order import NUMBERS
from tests.integration.conftest import Done, run_job
from tests.integration.fork import fork

pytestmark = pytest.mark.slow

EVERY = 5
TEST_ROWS = 100

_LAYER = "        self.fc2 = nn.Linear(128, SUM.classes)\n"
_SCORES = "return digit_scores, self.fc2(F.relu(self.fc1(torch.cat([digit_scores, one_hot], dim=1))))"
EDITS = (
    ("data/order.py", f"NUMBERS: Final = {NUMBERS}\n", f"NUMBERS: Final = {2 * NUMBERS}\n"),
    ("model/heads.py", "(DIGIT, SUM)", '(DIGIT, SUM, Head("even", 2, lambda digits, numbers: digits % 2 == 0))'),
    ("model/network.py", _LAYER, f"{_LAYER}        self.fc3 = nn.Linear(DIGIT.classes, 2)\n"),
    ("model/network.py", _SCORES, f"{_SCORES}, self.fc3(digit_scores)"),
)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fork(tmp_path_factory.mktemp("fork"), *EDITS)


@pytest.fixture(scope="module")
def trained(forked: dict[str, Any], data: Path) -> Done:
    flags = ("--data", data, "--epochs", 2, "--sum-head-steps", 200, "--precision", "fp32", "--name", "one", "--num-workers", 1)
    return run_job("train", *flags, **forked)


def test_training_evaluates_calibrates_and_draws_it(trained: Done, forked: dict[str, Any]) -> None:
    test, run = trained.line["test"], forked["cwd"] / "runs" / "one"
    assert test["pairs"] == 2 * NUMBERS * TEST_ROWS
    assert test["even_accuracy"] > 0.6, "it is trained"
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
import json, pyarrow.parquet as pq
from PIL import Image
from mnistsum_ray import decode_images, load_model, predict, predict_rows
model, rows = load_model("runs/one"), pq.read_table("in/part-00000.parquet").drop_columns(["digit"])
found = predict(model, decode_images(rows["image"])[0], rows["number"].to_numpy())
added = predict_rows(model, rows)
print(json.dumps([found.even.tolist() == added["pred_even"].to_pylist(), str(found.even.dtype), str(found.even_prob.dtype)]))
predict(model, Image.new("L", (28, 28)), 20)
"""


def test_scoring_answers_it_as_the_calibrated_model(trained: Done, data: Path, forked: dict[str, Any]) -> None:
    """Each test image once, with a number of the wider range."""
    run_job("export_pairs", "--data", data, "--output", "in", "--rows", TEST_ROWS, "--files", 1, **forked)
    flags = ("--model", "runs/one", "--label-column", "digit", "--precision", "fp32", "--num-workers", 1)
    line = run_job("score", *flags, "--input", "in", "--output", "out", **forked).line
    table = pq.read_table(forked["cwd"] / "out" / "predictions" / "part-00000.parquet")
    assert max(table["number"].to_pylist()) >= NUMBERS
    added = ("pred_digit", "digit_prob", "pred_sum", "sum_prob", "pred_even", "even_prob", "consistent")
    assert tuple(table.column_names[-len(added) :]) == added
    assert table.schema.field("pred_even").type == pa.bool_()
    right = table["pred_even"].to_numpy() == (table["digit"].to_numpy() % 2 == 0)
    assert line["even_accuracy"] == right.mean() == trained.line["test"]["even_accuracy"]
    scored, card = (json.loads((forked["cwd"] / name).read_text()) for name in ("out/manifest.json", "runs/one/model/model.json"))
    assert scored["probabilities"]["even"]["nll"] == pytest.approx(card["probabilities"]["even"]["nll"], abs=1e-4)
    assert "even correct, of 100 labelled rows" in (forked["cwd"] / "out" / "report.html").read_text()
    command = [sys.executable, "-c", _PREDICT]
    done = subprocess.run(command, cwd=forked["cwd"], env=os.environ | forked["env"], capture_output=True, text=True)
    assert json.loads(done.stdout) == [True, "bool", "float32"]
    assert done.stderr.endswith("RequestError: the number is 20, not one of 0..19\n")


def test_a_picture_is_answered_and_the_model_is_exported(trained: Done, forked: dict[str, Any]) -> None:
    picture = Image.new("L", (300, 400), "white")
    ImageDraw.Draw(picture).line([(80, 60), (220, 50), (140, 340)], width=30, joint="curve")
    picture.save(forked["cwd"] / "seven.png")
    number = NUMBERS + 5
    answer = run_job("predict", "seven.png", "--model", trained.line["run"], "--number", number, **forked)
    assert (answer.line["number"], type(answer.line["even"])) == (number, bool)
    assert f", digit + {number}: {answer.line['sum']} (" in answer.err
    assert f", even: {answer.line['even']} ({100 * answer.line['even_prob']:.2f} %)" in answer.err
    assert run_job("export_model", "--model", "runs/one", "--output", "exported", **forked).line["pairs"] == 2 * NUMBERS * 500
