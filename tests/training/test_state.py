"""What is saved comes back bit for bit; what is not a model is refused."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.evaluation import Metrics
from mnistsum_ray.model.loss import joint_loss
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights, load_model, save_model
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.state import (
    CheckpointError,
    EpochProgress,
    SumHeadResult,
    TrainerState,
    load_state,
    save_checkpoint,
    verify_checkpoint,
)

SCORES = Metrics(rows=10, pairs=100, loss=0.5, digit_accuracy=0.9, sum_accuracy=0.8, consistency=0.7)
LINE = {"epoch": 1, "best": True, "validation": asdict(SCORES), "test": asdict(SCORES)}


def step(model: TwoHeadCNN, optimizer: MuonAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (16, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (16,), generator=generator) for _ in range(2))
    digit_scores, sum_scores = model(prepare_images(images), numbers)
    optimizer.zero_grad()
    torch.autograd.backward(joint_loss(digit_scores, sum_scores, digits, numbers)[0])
    optimizer.step(1e-3, torch.float32)


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
    tuned = SumHeadResult(steps=5, kept=True, validation=SCORES, test=SCORES)
    progress = EpochProgress(7, 0.1 + 0.2, 448, 123_456, [(3, 192, 0.1)])
    state = TrainerState(1, [LINE], copy_weights(model), "fp32", progress, tuned)
    save_checkpoint(tmp_path, state, model, optimizer)
    other, other_optimizer = make(1)
    loaded = load_state(tmp_path, other, other_optimizer)
    assert (loaded.epochs_done, loaded.history, loaded.precision) == (1, [LINE], "fp32")
    assert (loaded.progress, loaded.sum_head) == (state.progress, tuned)
    assert same(loaded.best, state.best)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert same(copy_weights(model), copy_weights(other))


def test_a_model_comes_back(tmp_path: Path) -> None:
    model, _ = make(0)
    save_model(tmp_path, copy_weights(model), epoch=3, validation=SCORES, test=SCORES)
    loaded, card = load_model(locate(str(tmp_path), "--model"))
    assert same(copy_weights(loaded), copy_weights(model))
    assert not loaded.training
    assert (card["epoch"], card["parameters"], card["test"]["sum_accuracy"]) == (3, 220_125, 0.8)


@pytest.mark.parametrize("kept", [True, False])
def test_the_card_tells_how_the_sum_head_was_tuned(tmp_path: Path, *, kept: bool) -> None:
    before, after = asdict(SCORES), replace(SCORES, sum_accuracy=0.9)
    lines = [{"epoch": epoch, "best": epoch < 3, "validation": before, "test": before} for epoch in (1, 2, 3)]
    tuned = SumHeadResult(steps=5, kept=kept, validation=after, test=after)
    save_checkpoint(tmp_path, TrainerState(3, lines, copy_weights(make(0)[0]), "fp32", sum_head=tuned), *make(0))
    _, card = load_model(locate(str(tmp_path), "--model"))
    assert card["epoch"] == 2
    assert card["test"] == card["validation"] == asdict(after if kept else SCORES)
    metrics = {when: {"validation": of, "test": of} for when, of in (("before", before), ("after", asdict(after)))}
    assert card["sum_head"] == {"steps": 5, "kept": kept, **metrics}


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", copy_weights(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
    load_model(locate(str(tmp_path), "--model"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epoch": None}, "its 'epoch' is None"),
        ({"sha256": ["a"]}, "its 'sha256' is ['a']"),
        ({"temperature": {"digit": 1.0}}, "not a positive number for 'digit' and one for 'sum'"),
        ({"temperature": {"digit": 1.0, "sum": -1}}, "not a positive number for 'digit' and one for 'sum'"),
    ],
    ids=str,
)
def test_a_card_without_what_scoring_needs_is_refused(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    save_model(tmp_path, copy_weights(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
    card = tmp_path / "model.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | changed))
    with pytest.raises(RequestError) as refused:
        load_model(locate(str(tmp_path), "--model"))
    assert said in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = copy_weights(make(0)[0])
    weights["conv3.weight"][5, 7, 1, 2] = value
    save_model(tmp_path, weights, epoch=1, validation=SCORES, test=SCORES)
    with pytest.raises(RequestError, match=r"conv3\.weight holds NaN or infinite weights"):
        load_model(locate(str(tmp_path), "--model"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000], ids=["brackets", "braces"])
def test_a_card_that_is_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    save_model(tmp_path, copy_weights(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(RequestError, match="holds no model"):
        load_model(locate(str(tmp_path), "--model"))


@pytest.mark.parametrize("name", ["trainer.safetensors", "trainer.json", "model.safetensors", "model.json"])
@pytest.mark.parametrize("harm", ["missing", "cut short"])
def test_a_checkpoint_that_is_not_whole_is_known_for_one(tmp_path: Path, name: str, harm: str) -> None:
    model, optimizer = make(0)
    step(model, optimizer, 0)
    save_checkpoint(tmp_path, TrainerState(1, [LINE], copy_weights(model), "fp32"), model, optimizer)
    place = locate(str(tmp_path), "checkpoint")
    verify_checkpoint(place)
    file = tmp_path / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"is missing|is incomplete"):
        verify_checkpoint(place)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "holds no model"),
        ("no card", "holds no model"),
        ("other card", "its format is not 'mnistsum_ray/3'"),
        ("other weights", "SHA-256 differs"),
        ("pickle", "its tensors are not those of the network"),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, what: str, said: str) -> None:
    save_model(tmp_path, copy_weights(make(0)[0]), epoch=1, validation=SCORES, test=SCORES)
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
        torch.save(copy_weights(make(0)[0]), weights)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": digest}))
    with pytest.raises(RequestError) as refused:
        load_model(locate(str(tmp_path), "--model"))
    assert said in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
