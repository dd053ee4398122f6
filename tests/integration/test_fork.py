"""Another network in the place of the product's: its class, and the line that names it; every job follows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mnistsum_ray.data.sources import SAMPLE
from tests.integration.conftest import Done, run_job
from tests.integration.fork import fork

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

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        return self.body(images)

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        return digit_scores, self.head(torch.cat([digit_scores, self.one_hot[numbers].to(digit_scores.dtype)], dim=1))


def make_network() -> Network:
'''
EDITS = [
    ("model/heads.py", 'NETWORK: Final = "TwoHeadCNN"', 'NETWORK: Final = "SmallNet"'),
    ("model/network.py", "def make_network() -> Network:\n", NETWORK),
]
PARAMETERS = 16 * 25 + 2 * 16 + 32 * 16 * 9 + 2 * 32 + 1153 * 10 + 21 * 64 + 2 * 64 + 65 * 19
# The last batch of 4,000 rows has one row: a worker gets it, another none, and neither has the statistics of a batch.
BATCH, STEPS = 43, 94


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fork(tmp_path_factory.mktemp("fork"), *EDITS)


@pytest.fixture(scope="module")
def trained(forked: dict[str, Any]) -> Done:
    flags = ("--data", "sample", "--epochs", 1, "--batch-size", BATCH, "--num-workers", 2, "--sum-head-steps", 300)
    return run_job("train", *flags, "--precision", "fp32", "--name", "one", **forked)


def test_it_is_trained_by_two_workers_and_its_buffers_are_in_the_model(trained: Done, forked: dict[str, Any]) -> None:
    assert trained.line["parameters"] == PARAMETERS
    folder = Path(trained.line["model"])
    card, tensors = json.loads((folder / "model.json").read_text()), load_file(folder / "model.safetensors")
    assert (card["network"], card["parameters"]) == ("SmallNet", PARAMETERS)
    assert "int8" not in card
    assert tensors["body.1.num_batches_tracked"] == tensors["head.1.num_batches_tracked"] == STEPS - 1
    assert all(np.isfinite(value).all() and value.any() for value in tensors.values())
    assert min(trained.line["test"][name] for name in ("digit_accuracy", "sum_accuracy")) > 0.8


def test_it_scores_predicts_and_is_exported(trained: Done, forked: dict[str, Any], tmp_path: Path) -> None:
    model, pairs, out = trained.line["model"], tmp_path / "pairs", tmp_path / "out"
    rows = 10 * trained.line["test"]["rows"]
    assert run_job("export_pairs", "--data", "sample", "--rows", rows, "--output", pairs, **forked).code == 0
    flags = ("--model", model, "--input", pairs, "--output", out, "--label-column", "digit")
    refused = run_job("score", *flags, "--precision", "int8", **forked)
    assert (refused.code, "--precision int8: the model holds no calibration" in refused.error) == (2, True)
    scored = run_job("score", *flags, "--precision", "fp32", **forked).line
    assert scored["scored_rows"] == rows
    # The images were evaluated by both workers, half by each: had one other buffers than the model, it would answer otherwise.
    assert scored["digit_accuracy"] == pytest.approx(trained.line["test"]["digit_accuracy"])
    sample = pq.read_table(SAMPLE)
    Image.fromarray(np.frombuffer(sample["image"][0].as_py(), np.uint8).reshape(28, 28)).save(tmp_path / "digit.png")
    answer = run_job("predict", tmp_path / "digit.png", "--number", 5, "--model", model, **forked).line
    assert answer["digit"] == sample["digit"][0].as_py()
    exported = run_job("export_model", "--model", model, "--output", tmp_path / "exported", **forked).line
    assert exported["largest_difference"] < 1e-4


def test_its_model_is_refused_by_its_name_where_the_network_is_another(trained: Done, tmp_path: Path) -> None:
    sample = pq.read_table(SAMPLE)[:5]
    pq.write_table(sample.append_column("number", sample["digit"]), tmp_path / "in.parquet")
    flags = ("--model", trained.line["model"], "--input", tmp_path / "in.parquet", "--output", tmp_path / "out")
    refused = run_job("score", *flags)
    assert (refused.code, "its 'network' is SmallNet, and here TwoHeadCNN" in refused.error) == (2, True), refused.err
