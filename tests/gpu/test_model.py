"""The network, its training step and its state on a GPU, beside the same on the CPU."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.model.device import all_reduce_sum, broadcast_parameters
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import Objective, TwoHeadCNN, distort, dropout_factors, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from mnistsum_ray.model.serialization import copy_weights
from mnistsum_ray.storage.paths import locate
from mnistsum_ray.training.checkpoint import TrainerState, load_state, save_checkpoint
from tests.gpu.conftest import CUDA
from tests.model import random_rows

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")


def make_model(device: torch.device) -> TwoHeadCNN:
    """The same random weights on every device."""
    torch.manual_seed(0)
    return TwoHeadCNN().to(device)


class Training:
    """The model and its optimizer on a device, with 64 rows of all that a step uses."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        self.model, self.dtype, self.dropout, rows = make_model(device), dtype, dropout, 64
        self.optimizer, self.generator = MuonAdamW(self.model, 0.01), torch.Generator(device)
        self.images, self.digits, self.numbers = (values.to(device) for values in random_rows(rows))
        self.matrices = torch.from_numpy(distortions(0, 0, np.arange(rows), 0.5)).to(device)
        self.scale = torch.tensor(1 / rows, device=device)

    def steps(self, count: int) -> None:
        objective = Objective(self.model, 0.05, self.dtype)
        for step in range(count):
            self.optimizer.zero_grad()
            generator = self.generator.manual_seed(step)
            factors = dropout_factors(len(self.digits), self.dropout, generator) if self.dropout else None
            loss, _ = objective(distort(prepare_images(self.images), self.matrices), self.numbers, self.digits, factors)
            loss.backward(self.scale)
            self.optimizer.step(1e-3, self.dtype)


def test_float32_is_float32() -> None:
    images, _, numbers = random_rows(256)
    exact = [scores.detach() for scores in make_model(CPU).double()(prepare_images(images).double(), numbers)]
    ours = make_model(CUDA)(prepare_images(images.to(CUDA)), numbers.to(CUDA))
    for scores, expected in zip(ours, exact, strict=True):
        error = (scores.detach().cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, "TF32 would err by about 1e-3"


def test_three_steps_are_those_of_the_cpu() -> None:
    before, trained = copy_weights(make_model(CPU)), {}
    for device in (CPU, CUDA):
        training = Training(device)
        training.steps(3)
        trained[device.type] = copy_weights(training.model)
    for name, start in before.items():
        moved = (trained["cpu"][name] - start).norm()
        assert (trained["cuda"][name] - trained["cpu"][name]).norm() < 0.02 * moved, name


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(dtype: torch.dtype, dropout: float) -> None:
    trainer = Training(CUDA, dtype, dropout=dropout)
    trainer.steps(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.steps(15)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_share_has_gradients_of_zero(dtype: torch.dtype) -> None:
    model = make_model(CUDA)
    images, digits, numbers = (values.to(CUDA) for values in random_rows(0))
    loss, _ = Objective(model, 0.05, dtype)(prepare_images(images), numbers, digits, None)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_one_rank_of_nccl_reduces_every_dtype(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for dtype in (torch.float32, torch.float64, torch.int64):
            values = torch.arange(5, device=CUDA).to(dtype)
            assert torch.equal(all_reduce_sum(values), values)
        model = make_model(CUDA)
        before = copy_weights(model)
        broadcast_parameters(model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in copy_weights(model).items())
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_goes_from_gpu_to_cpu_and_back(tmp_path: Path) -> None:
    training = Training(CUDA)
    training.steps(3)
    weights, state = copy_weights(training.model), TrainerState(0, [], "fp32")
    first = {name: {key: value.cpu().clone() for key, value in of.items()} for name, _, of in training.optimizer.states()}
    for device in (CPU, CUDA):
        folder = tmp_path / device.type
        folder.mkdir()
        save_checkpoint(folder, state, training.model, training.optimizer)
        training = Training(device)
        state = load_state(locate(str(folder), "checkpoint"), training.model, training.optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in copy_weights(training.model).items())
    for name, parameter, moments in training.optimizer.states():
        for key, value in moments.items():
            assert torch.equal(value.cpu(), first[name][key]), (name, key)
            assert key == "step" or value.device == parameter.device
    training.steps(1)


@pytest.mark.parametrize(("precision", "most_different", "tolerance"), [("fp32", 0, 1e-4), ("bf16", 200, 0.05)])
def test_predictions_are_those_of_the_cpu(precision: str, most_different: int, tolerance: float) -> None:
    images, _, numbers = (values.numpy() for values in random_rows(4_000))
    weights = copy_weights(make_model(CPU))
    gpu, cpu = (Predictor(weights, *kind, None).predict(images, numbers) for kind in ((CUDA, precision), (CPU, "fp32")))
    assert np.count_nonzero(gpu.digit != cpu.digit) <= most_different
    assert np.count_nonzero(gpu.sum != cpu.sum) <= most_different
    assert np.abs(gpu.digit_prob - cpu.digit_prob).max() < tolerance
    assert np.abs(gpu.sum_prob - cpu.sum_prob).max() < tolerance


def test_predictions_with_labels_and_without_rows() -> None:
    images, digits, numbers = (values.numpy() for values in random_rows(100))
    weights = copy_weights(make_model(CPU))
    gpu, cpu = (Predictor(weights, device, "fp32", 32) for device in (CUDA, CPU))
    ours, theirs = (predictor.predict(images, numbers, digits) for predictor in (gpu, cpu))
    for name, values in ours.values.items():
        assert np.allclose(values, theirs.values[name], atol=1e-3), name
    assert len(gpu.predict(images[:0], numbers[:0]).digit) == 0


def test_a_compiled_step_is_recorded_once_and_nothing_is_left_out() -> None:
    counters.clear()
    model = make_model(CUDA)
    plain, compiled = Objective(model, 0.0, torch.bfloat16), copy.deepcopy(model)
    graphed = torch.compile(Objective(compiled, 0.0, torch.bfloat16), mode="reduce-overhead", dynamic=False)
    images, digits, numbers = (values.to(CUDA) for values in random_rows(64))
    for step in range(8):
        for objective in (plain, graphed):
            loss, _ = objective(prepare_images(images), numbers, digits, None)
            loss.backward()
        if step < 7:
            for parameter in (*model.parameters(), *compiled.parameters()):
                parameter.grad = None
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 0.05 * theirs.grad.norm()
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
