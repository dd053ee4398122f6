"""Checkpoints: what is saved comes back bit for bit, and what is not whole is known for it."""

from pathlib import Path

import pytest
import torch

from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Metrics
from mnistsum_ray.model.network import Network, joint_loss, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.analysis import describe
from mnistsum_ray.training.checkpoint import (
    STATE_CARD,
    STATE_FILE,
    STATE_FORMAT,
    TrainerState,
    latest_valid_checkpoint,
    read_checkpoint,
    restore,
    save_checkpoint,
)

SCORES: Metrics = {"rows": 10, "pairs": 100, "loss": 0.5, "consistency": 0.7}
SCORES |= {f"{head.name}_accuracy": 0.9 for head in HEADS}
LINE = {"epoch": 1, "validation": SCORES, "test": SCORES}


def step(model: Network, optimizer: MuonAdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (16, 28, 28), dtype=torch.uint8, generator=generator)
    digits, numbers = (torch.randint(0, 10, (16,), generator=generator) for _ in range(2))
    scores = model(prepare_images(images), numbers)
    optimizer.zero_grad()
    torch.autograd.backward(joint_loss(scores, digits, numbers)[0])
    optimizer.set_learning_rate(1e-3)
    optimizer.step()


def make(seed: int) -> tuple[Network, MuonAdamW]:
    torch.manual_seed(seed)
    model = make_network()
    return model, MuonAdamW(model, 0.01, torch.float32)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = make(0)
    for seed in range(3):
        step(model, optimizer, seed)
    tuned = {"steps": 5, "kept": True, "validation": SCORES, "test": SCORES}
    state = TrainerState(1, [LINE], "fp32", tuned)
    save_checkpoint(tmp_path, state, model, optimizer)
    other, other_optimizer = make(1)
    loaded, tensors = read_checkpoint(locate(str(tmp_path), "checkpoint"))
    restore(tensors, other, other_optimizer)
    assert loaded == state
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_fine_tuning_that_was_undone_is_in_the_description_and_its_metrics_are_not_the_models() -> None:
    after = SCORES | {"sum_accuracy": 0.5}
    tuned = {"steps": 5, "kept": False, "validation": after, "test": after}
    description = describe(TrainerState(1, [LINE], "fp32", sum_head=tuned), copy_weights(make(0)[0]))
    assert description["test"] == description["validation"] == SCORES
    before_and_after = {when: {"validation": of, "test": of} for when, of in (("before", SCORES), ("after", after))}
    assert description["sum_head"] == {"steps": 5, "kept": False, **before_and_after}


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_one_of_another_version_is_refused(tmp_path: Path) -> None:
    place, said = locate(str(tmp_path), "--name"), list[str]()
    assert latest_valid_checkpoint(place, said.append) is None
    model, optimizer = make(0)
    for number in range(1, 6):
        folder = tmp_path / f"epoch_{number:05d}"
        folder.mkdir()
        save_checkpoint(folder, TrainerState(number, [LINE], "fp32"), model, optimizer)
        damaged = folder / (STATE_FILE if number % 2 else STATE_CARD)
        if number in (2, 3):
            damaged.unlink()
        elif number > 3:
            damaged.write_bytes(damaged.read_bytes()[:-9])
    latest = latest_valid_checkpoint(place, said.append)
    assert latest is not None
    assert latest.path == f"{tmp_path}/epoch_00001"
    reasons = [line.partition(" cannot be used: ")[2] for line in said]
    assert [" ".join(reason.split()[:3]) for reason in reasons] == [
        "trainer.safetensors is incomplete",
        "trainer.json is incomplete",
        "a file is",
        "a file is",
    ]
    (tmp_path / "epoch_00006").mkdir()
    others = {
        '"mnistsum_ray/11"': "it was written by another version",
        f'"{STATE_FORMAT}", "interface": {{"number": "0..19"}}': "it is of another network",
    }
    for other, why in others.items():
        (tmp_path / "epoch_00006" / STATE_CARD).write_text(f'{{"format": {other}}}')
        with pytest.raises(RequestError, match=f"epoch_00006 cannot be used: {why}"):
            latest_valid_checkpoint(place, print)
