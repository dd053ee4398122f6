"""Checkpoints: all bits come back, and what is not whole is known for it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from mnistsum_ray.errors import CheckpointError, RequestError, TaskError
from mnistsum_ray.mnist.optimizer import MuonAdamW
from mnistsum_ray.model.folder import checksum, copy_weights
from mnistsum_ray.storage.store import Location
from mnistsum_ray.training import checkpoint as saved
from mnistsum_ray.training.checkpoint import STATE_DIGEST, STATE_FILE, STATE_FORMAT, TrainerState
from tests.mnist import new_model
from tests.tasks import Points, points

LINE = {"epoch": 1, "train_loss": 1 / 3, "validation": {"loss": 0.1 + 0.2}}
STATE = TrainerState(1, [LINE], "fp32", "mnistsum", "code")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = new_model(0)
    optimizer = MuonAdamW(model, 0.01, bf16=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved.save_checkpoint(folder, STATE, model, optimizer)
    return folder


def test_all_bits_come_back(tmp_path: Path, whole: Path) -> None:
    state, tensors = saved.read_checkpoint(Location(str(whole)))
    model = new_model(1)
    optimizer = MuonAdamW(model, 0.01, bf16=False)
    saved.restore(tensors, model, optimizer)
    saved.save_checkpoint(tmp_path, state, model, optimizer)
    assert (tmp_path / STATE_FILE).read_bytes() == (whole / STATE_FILE).read_bytes()


def two_groups(network: nn.Module) -> Optimizer:
    weights = [one for name, one in network.named_parameters() if name.endswith("weight")]
    biases = [one for name, one in network.named_parameters() if name.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "lr_factor": 0.1}]
    return torch.optim.Adam(groups, amsgrad=True)


def frozen(network: nn.Module) -> Optimizer:
    next(network.parameters()).requires_grad = False
    return Points().optimizer(network, 0.1, bf16=False)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "without a state": lambda network: torch.optim.SGD(network.parameters()),
    "with momentum": lambda network: torch.optim.SGD(network.parameters(), momentum=0.9),
    "the default": lambda network: Points().optimizer(network, 0.1, bf16=False),
    "two groups": two_groups,
    "a frozen parameter": frozen,
    "numbers": lambda network: torch.optim.NAdam(network.parameters()),
    "a state of another shape": lambda network: torch.optim.Adafactor(network.parameters()),
    "a step that is a number": lambda network: torch.optim.ASGD(network.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_goes_on_to_the_same_bits_with_any_optimizer_of_pytorch(
    tmp_path: Path, name: str
) -> None:
    def begin(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        network = Points().network()
        return network, OPTIMIZERS[name](network)

    def train(network: nn.Module, optimizer: Optimizer, rate: float) -> None:
        optimizer.zero_grad()
        batch = points(20)
        torch.autograd.backward(Points().loss(network(batch), batch).mean())
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        optimizer.step()

    network, optimizer = begin(0)
    train(network, optimizer, 0.01)
    saved.save_checkpoint(tmp_path, STATE, network, optimizer)
    train(network, optimizer, 0.02)
    other, again = begin(1)
    saved.restore(saved.read_checkpoint(Location(str(tmp_path)))[1], other, again)
    train(other, again, 0.02)
    assert checksum(copy_weights(other)) == checksum(copy_weights(network))


def test_an_optimizer_that_keeps_something_else_is_named(tmp_path: Path) -> None:
    network = Points().network()
    optimizer = torch.optim.SGD(network.parameters())
    optimizer.state[next(network.parameters())]["hook"] = print
    said = "^task mnistsum: the optimizer keeps what is neither a tensor nor a number, and cannot"
    with pytest.raises(TaskError, match=said):
        saved.save_checkpoint(tmp_path, STATE, network, optimizer)


def write(folder: Path, data: bytes, digest: str = "") -> Location:
    """Write a checkpoint, by default with the digest that fits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE_FILE).write_bytes(data)
    (folder / STATE_DIGEST).write_text(digest or hashlib.sha256(data).hexdigest())
    return Location(str(folder))


def test_a_bit_flipped_anywhere_or_an_end_cut_off_is_refused(tmp_path: Path, whole: Path) -> None:
    files = {name: (whole / name).read_bytes() for name in (STATE_FILE, STATE_DIGEST)}
    place = write(tmp_path, files[STATE_FILE], files[STATE_DIGEST].decode())
    assert saved.read_checkpoint(place)[0] == STATE
    said = f"^checkpoint {tmp_path} cannot be used: .* damaged"
    random = np.random.default_rng(0)
    for name, data in files.items():
        # The length and the header are in the first bytes, a small part of the file.
        ends = (min(len(data), 2000), len(data))
        for index in [*range(16), *random.integers(ends, size=(40, 2)).ravel()]:
            flipped = bytearray(data)
            flipped[index] ^= 1 << int(random.integers(8))
            for damaged in (flipped, data[:index]):
                (tmp_path / name).write_bytes(damaged)
                with pytest.raises(CheckpointError, match=said):
                    saved.read_checkpoint(place)
        (tmp_path / name).write_bytes(data)


def test_the_newest_whole_checkpoint_of_all_attempts_is_found(tmp_path: Path, whole: Path) -> None:
    """Of two of one epoch that of the later attempt; each that is passed over gets a line."""
    run, folder, said = Location(str(tmp_path)), tmp_path / saved.CHECKPOINTS, list[str]()
    assert saved.newest_checkpoint(run, said.append) is None
    data = (whole / STATE_FILE).read_bytes()
    attempts = ((9, 11), (10, 10), (2, 10), (2, 2), (1, 2), (1, 1))
    names = [f"{attempt:04}/epoch_{epoch:05}" for attempt, epoch in attempts]
    for name in names:
        write(folder / name, data)
    (folder / "0010" / "checkpoint_manager_snapshot.json").write_text("{")  # Ray Train's own
    for passed_over, name in enumerate(names):
        said.clear()
        found = saved.newest_checkpoint(run, said.append)
        assert found == name
        before = [f"checkpoint {folder}/{other}" for other in names[:passed_over]]
        assert [line.partition(" cannot be used")[0] for line in said] == before
        if passed_over % 2:
            (folder / name / STATE_DIGEST).unlink()
        else:
            (folder / name / STATE_FILE).write_bytes(data[:-1])
    assert saved.newest_checkpoint(run, said.append) is None


def test_a_newest_checkpoint_of_another_version_is_refused(tmp_path: Path, whole: Path) -> None:
    """An older one would train epochs again."""
    data, folder = (whole / STATE_FILE).read_bytes(), tmp_path / saved.CHECKPOINTS / "0001"
    other = STATE_FORMAT[:-1] + "9"
    write(folder / "epoch_00001", data)
    write(folder / "epoch_00002", data.replace(STATE_FORMAT.encode(), other.encode()))
    said = "^--resume: checkpoint .*2 cannot be used: it is of another version"
    with pytest.raises(RequestError, match=said):
        saved.newest_checkpoint(Location(str(tmp_path)), print)
