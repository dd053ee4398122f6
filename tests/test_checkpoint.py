"""What is saved comes back bit for bit; what is not a model is refused."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mnistsum_ray.checkpoint import (
    EpochSoFar,
    Lesson,
    TrainerState,
    load_model,
    load_state,
    save_best,
    save_model,
    save_state,
    weights_of,
)
from mnistsum_ray.config import Refusal
from mnistsum_ray.metrics import Scores
from mnistsum_ray.model import TwoHeadCNN, joint_loss, prepare_images
from mnistsum_ray.optimizer import MuonAdamW
from mnistsum_ray.storage import locate

SCORES = Scores(rows=10, pairs=100, loss=0.5, digit_accuracy=0.9, sum_accuracy=0.8)


def step(model: TwoHeadCNN, optimizer: MuonAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (16, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (16,), generator=generator) for _ in range(2))
    digit_scores, sum_scores = model(prepare_images(images), numbers)
    optimizer.zero_grad()
    torch.autograd.backward(joint_loss(digit_scores, sum_scores, digits, numbers))
    optimizer.step(1e-3)


def make(seed: int) -> tuple[TwoHeadCNN, MuonAdamW]:
    torch.manual_seed(seed)
    model = TwoHeadCNN()
    return model, MuonAdamW(model, weight_decay=0.01)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    model, optimizer = make(0)
    for seed in range(3):
        step(model, optimizer, seed)
    taught = Lesson(steps=5, kept=True, agreement=(0.5, 0.75), validation=SCORES, test=SCORES)
    state = TrainerState(1, [{"epoch": 1}], weights_of(model), "fp32", EpochSoFar(7, 0.1 + 0.2, 448, 123_456), taught)
    save_state(tmp_path, state, model, optimizer)
    other, other_optimizer = make(1)
    loaded = load_state(tmp_path, other, other_optimizer)
    assert (loaded.epochs_done, loaded.history, loaded.precision) == (1, [{"epoch": 1}], "fp32")
    assert (loaded.progress, loaded.lesson) == (state.progress, taught)
    assert same(loaded.best, state.best)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert same(weights_of(model), weights_of(other))


def test_a_model_comes_back(tmp_path: Path) -> None:
    model, _ = make(0)
    save_model(tmp_path, weights_of(model), epoch=3, validation=SCORES, test=SCORES)
    loaded, card = load_model(locate(str(tmp_path), "--model"))
    assert same(weights_of(loaded), weights_of(model))
    assert not loaded.training
    assert (card["epoch"], card["parameters"], card["test"]["sum_accuracy"]) == (3, 220_125, 0.8)


@pytest.mark.parametrize("kept", [True, False])
def test_the_card_tells_of_the_lesson_that_the_model_has_had(tmp_path: Path, *, kept: bool) -> None:
    before, after = asdict(SCORES), replace(SCORES, sum_accuracy=0.9)
    lines = [{"epoch": epoch, "best": epoch < 3, "validation": before, "test": before} for epoch in (1, 2, 3)]
    taught = Lesson(steps=5, kept=kept, agreement=(0.5, 0.75), validation=after, test=after)
    save_best(tmp_path, TrainerState(3, lines, weights_of(make(0)[0]), "fp32", lesson=taught))
    _, card = load_model(locate(str(tmp_path), "--model"))
    assert card["epoch"] == 2
    assert card["test"] == card["validation"] == asdict(after if kept else SCORES)
    told = (("before", before, 0.5), ("after", asdict(after), 0.75))
    scores = {name: {"validation": these, "test": these, "agreement": agreement} for name, these, agreement in told}
    assert card["lesson"] == {"steps": 5, "kept": kept, **scores}


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", weights_of(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
    load_model(locate(str(tmp_path), "--model"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "holds no model"),
        ("no card", "holds no model"),
        ("other card", "does not say format 'mnistsum_ray/1'"),
        ("other weights", "SHA-256 differs"),
        ("pickle", "its tensors are not those of the network"),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, what: str, said: str) -> None:
    save_model(tmp_path, weights_of(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
    card, weights = tmp_path / "model.json", tmp_path / "model.safetensors"
    if what == "nothing":
        card.unlink()
        weights.unlink()
    elif what == "no card":
        card.write_text("{")
    elif what == "other card":
        card.write_text(json.dumps(json.loads(card.read_text()) | {"format": "else"}))
    elif what == "other weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    else:
        torch.save(weights_of(make(0)[0]), weights)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": digest}))
    with pytest.raises(Refusal) as refused:
        load_model(locate(str(tmp_path), "--model"))
    assert said in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
