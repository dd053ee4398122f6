"""A network of one's own with a third head: trained, calibrated, saved and asked."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from mnistsum_ray import RequestError, predict_rows
from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.randomness import NUMBERS, RowTotals
from mnistsum_ray.model.folder import INTERFACE, write_model
from mnistsum_ray.model.heads import DIGIT, HEADS, SUM, Head, prediction_fields, probability_fields
from mnistsum_ray.model.metrics import AnswerCounts, finish_model
from mnistsum_ray.model.network import Network, Scores, score_digits, with_one_hot
from mnistsum_ray.storage.uri import locate
from tests.training import CPU, as_worker, new_trainer

EVEN = Head("even", 2, lambda digits, numbers: 1 - digits % 2)
BATCH, STEPS, EPOCHS = 64, 70, 4


class SmallNet(Network):
    """A strided convolution, batch normalization, and no dropout."""

    muon_layers = ("first",)
    head_layers = ("first", "norm", "sum", "even")
    digit_readers = ("first", "even")
    output_layers: ClassVar = {"digit": "last", "sum": "sum", "even": "even"}

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(1, 32, 5, stride=3, bias=False)
        self.body = nn.Sequential(convolution, nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten())
        self.last = nn.Linear(32 * 8 * 8, DIGIT.classes)
        self.first = nn.Linear(DIGIT.classes + NUMBERS, 64)
        self.norm = nn.BatchNorm1d(64)
        self.sum = nn.Linear(64, SUM.classes)
        self.even = nn.Linear(DIGIT.classes, EVEN.classes)

    def digit_scores(self, images: Tensor, dropout: Tensor | None = None) -> Tensor:
        scores: Tensor = self.last(self.body(images))
        return scores

    def scores(self, digit_scores: Tensor, numbers: Tensor) -> Scores:
        hidden = self.norm(self.first(with_one_hot(digit_scores, numbers))).relu()
        return digit_scores, self.sum(hidden), self.even(digit_scores)


@pytest.fixture(autouse=True)
def other_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmallNet and three heads, wherever a module has taken the table's names."""
    heads = (*HEADS, EVEN)
    scores = {head.name: f"{head.classes} scores" for head in heads}
    changed = {
        "NETWORK": SmallNet,
        "HEADS": heads,
        "PREDICTION_FIELDS": prediction_fields(heads),
        "PROBABILITY_FIELDS": probability_fields(heads),
        "INTERFACE": INTERFACE | {"network": "SmallNet", "output": scores},
    }
    ours = [module for name, module in sys.modules.items() if name.startswith("mnistsum_ray")]
    for module in ours:
        for name in changed.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, changed[name])


def test_it_is_trained_calibrated_saved_and_asked(sample: pa.Table, tmp_path: Path) -> None:
    images = torch.tensor(pixels_view(sample["image"].combine_chunks()))
    digits = torch.tensor(sample["digit"].to_pylist())
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images), generator=draw)
    held_out = rows[4500:]
    test = {"image": images[held_out], "digit": digits[held_out], "row_id": held_out}

    trainer = as_worker(lambda: new_trainer(batch_size=BATCH))
    model = trainer.model
    assert isinstance(model, SmallNet)
    for epoch in range(EPOCHS):
        numbers = torch.randint(NUMBERS, digits.shape, generator=draw)
        for step, ids in enumerate(torch.split(rows[: STEPS * BATCH + 1], BATCH)):
            batch = {"image": images[ids], "digit": digits[ids], "number": numbers[ids]}
            trainer._step(batch, epoch, step, len(ids), 0.02 * (1 - epoch / EPOCHS))
    # The last batch of each has one row, of which there are no statistics.
    seen = EPOCHS * STEPS
    assert model.norm.num_batches_tracked == model.get_buffer("body.1.num_batches_tracked") == seen

    model.eval()
    scored = [(test, score_digits(model, test["image"], bf16=False))]
    counts = AnswerCounts(CPU)
    counts.add(test, model.scores_of_all_numbers(scored[0][1]))
    metrics = counts.metrics(RowTotals.of(held_out.numpy()))
    assert min(metrics[f"{head}_accuracy"] for head in ("digit", "sum", "even")) > 0.8
    history: list[Any] = [{"epoch": EPOCHS, "validation": metrics, "test": metrics}]
    finished = finish_model(model, scored, scored, history, "fp32")
    assert finished.error_analysis["probabilities"].keys() == {"digit", "sum", "even"}

    write_model(locate(str(tmp_path / "model"), ""), finished.weights, finished.description)
    table = sample.take(held_out.numpy())
    table = table.append_column("number", pa.array(numbers[held_out].numpy()))
    answered = predict_rows(tmp_path, table, probabilities=True)
    right = answered["pred_even"].to_numpy() == 1 - table["digit"].to_numpy() % 2
    assert right.mean() > 0.8
    assert set(map(len, answered["even_probs"].to_pylist())) == {2}


def test_dropout_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^--dropout 0\.2\d*: the network has no dropout"):
        as_worker(lambda: new_trainer(recipe="long"))
