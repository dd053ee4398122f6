"""The network, its training step and its state on a GPU, beside the same on the CPU.

Float32 on a GPU errs by 1e-5, TF32 by 1.6e-3: 1e-4 tells them apart.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.model.device import all_reduce_sum, broadcast_state, disable_tf32
from mnistsum_ray.model.folder import Weights, copy_weights
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import Network, Objective, distort, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from tests.gpu.conftest import CUDA, two_gpus
from tests.model import random_rows

CPU = torch.device("cpu")
ROWS = 64

gpu = pytest.mark.gpu
each_device = pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=gpu)], ids=str)


def make_model(device: torch.device) -> Network:
    """The same random weights on every device."""
    torch.manual_seed(0)
    return make_network().to(device)


class Training:
    """The model and its optimizer on a device, with a rank's part of some rows of all that a step uses."""

    def __init__(self, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.model = make_model(device)
        rows = slice(ROWS * rank // ranks, ROWS * (rank + 1) // ranks)
        self.optimizer = MuonAdamW(self.model, 0.01, torch.float32)
        self.images, self.digits, self.numbers = (
            values[rows].to(device) for values in random_rows(ROWS)
        )
        matrices = torch.from_numpy(distortions(0, 0, np.arange(ROWS), 0.5))
        self.matrices = matrices[rows].to(device)
        self.scale = torch.tensor(ranks / ROWS, device=device)
        self.objective: torch.nn.Module = Objective(self.model, 0.05, torch.float32)
        if ranks > 1:
            devices = [device] if device.type == "cuda" else None
            self.objective = DistributedDataParallel(
                self.objective, devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            images = distort(prepare_images(self.images), self.matrices)
            loss, _ = self.objective(images, self.numbers, self.digits, None)
            loss.backward(self.scale)
            self.optimizer.set_learning_rate(1e-3)
            self.optimizer.step()


def check_trained_alike(ours: Weights, theirs: Weights) -> None:
    """Assert that the weights have moved alike from those of `make_model`."""
    for name, start in copy_weights(make_model(CPU)).items():
        assert (ours[name] - theirs[name]).norm() < 0.02 * (theirs[name] - start).norm(), name


@each_device
def test_float32_is_float32(device: torch.device) -> None:
    images, _, numbers = random_rows(256)
    exact = [
        scores.detach()
        for scores in make_model(CPU).double()(prepare_images(images).double(), numbers)
    ]
    ours = make_model(device)(prepare_images(images.to(device)), numbers.to(device))
    for scores, expected in zip(ours, exact, strict=True):
        assert (scores.detach().cpu().double() - expected).abs().max() < 1e-4 * expected.abs().max()


@gpu
def test_three_steps_are_those_of_the_cpu() -> None:
    trained = [Training(device) for device in (CUDA, CPU)]
    for training in trained:
        training.steps(3)
    check_trained_alike(*(copy_weights(training.model) for training in trained))


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", "cpu"),
        pytest.param("gloo", "cuda", marks=gpu),  # both on one card, which NCCL refuses
        pytest.param("nccl", "cuda", marks=[gpu, two_gpus]),
    ],
)
def test_two_ranks_train_as_one(backend: str, device: str, tmp_path: Path) -> None:
    spawn(train_rank, (backend, device, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    alone = Training(torch.device(device))
    alone.steps(3)
    check_trained_alike(load_file(tmp_path / "weights.safetensors"), copy_weights(alone.model))


def train_rank(rank: int, backend: str, device_type: str, folder: str) -> None:
    disable_tf32()  # a process that is spawned does not inherit it
    torch.set_num_threads(1)
    device = torch.device(device_type, rank if backend == "nccl" else 0)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for dtype in (torch.float32, torch.float64, torch.int64):
        values = torch.arange(5, device=device).to(dtype)
        assert torch.equal(all_reduce_sum(values), 2 * values)
    training = Training(device, rank=rank, ranks=2)
    training.steps(3)
    broadcast_state(training.model)
    if rank == 1:
        save_file(copy_weights(training.model), f"{folder}/weights.safetensors")
    # DDP's reducer must not hold the group last: it would join gloo's thread with the GIL held, for which that thread may wait.
    del training
    dist.destroy_process_group()


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_share_has_gradients_of_zero(device: torch.device, dtype: torch.dtype) -> None:
    model = make_model(device)
    images, digits, numbers = (values.to(device) for values in random_rows(0))
    loss, _ = Objective(model, 0.05, dtype)(prepare_images(images), numbers, digits, None)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def optimizer_state(training: Training) -> dict[str, Weights]:
    """The optimizer's state by parameter, on the CPU."""
    state = training.optimizer.state
    return {
        name: {key: value.cpu().clone() for key, value in state[parameter].items()}
        for name, parameter in training.model.named_parameters()
    }


@each_device
def test_a_checkpoint_goes_to_the_cpu_and_back(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="checkpoints are reported to Ray Train")
    from mnistsum_ray.storage.uri import locate
    from mnistsum_ray.training.checkpoint import (
        TrainerState,
        read_checkpoint,
        restore,
        save_checkpoint,
    )

    training = Training(device)
    training.steps(3)
    weights, state = copy_weights(training.model), TrainerState(0, [], "fp32")
    first = optimizer_state(training)
    first_training = training
    for number, place in enumerate((CPU, device)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_checkpoint(folder, state, training.model, training.optimizer)
        training = Training(place)
        state, tensors = read_checkpoint(locate(str(folder), "checkpoint"))
        restore(tensors, training.model, training.optimizer)
    assert all(
        torch.equal(value, weights[name]) for name, value in copy_weights(training.model).items()
    )
    for name, values in optimizer_state(training).items():
        for key, value in values.items():
            assert torch.equal(value, first[name][key]), (name, key)
    first_training.steps(1)
    training.steps(1)
    after = copy_weights(first_training.model)
    for name, value in copy_weights(training.model).items():
        assert torch.allclose(value, after[name], atol=1e-6), (
            f"{name}: a step after the checkpoint is another"
        )


@each_device
@pytest.mark.parametrize(
    ("precision", "most_different", "tolerance"), [("fp32", 0.0, 1e-4), ("bf16", 0.05, 0.05)]
)
def test_predictions_are_those_of_the_cpu(
    device: torch.device, precision: str, most_different: float, tolerance: float
) -> None:
    images, _, numbers = (values.numpy() for values in random_rows(100 if device == CPU else 1_000))
    weights = copy_weights(make_model(CPU))
    exact = Predictor(weights, CPU, "fp32", 50).predict(images, numbers, probs=True)
    predictor = Predictor(weights, device, precision, None)
    ours = predictor.predict(images, numbers, probs=True)
    for name in ("pred_digit", "pred_sum"):
        assert np.mean(ours.values[name] != exact.values[name]) <= most_different
    for name in ("digit_prob", "sum_prob", "digit_probs", "sum_probs"):
        assert np.allclose(ours.values[name], exact.values[name], rtol=tolerance, atol=tolerance), (
            name
        )
    assert len(predictor.predict(images[:0], numbers[:0]).digit) == 0
