"""The network, its training steps and its predictions on a GPU, beside the same on the CPU.

Float32 on a GPU errs by 1e-5, TF32 by 1.6e-3: 1e-4 tells them apart.
"""

import numpy as np
import pytest
import torch

from mnistsum_ray.data.randomness import distortions
from mnistsum_ray.model.device import disable_tf32
from mnistsum_ray.model.folder import Weights, copy_weights
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.model.network import Objective, TwoHeadCNN, distort, make_network, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from tests.model import random_rows
from tests.model.conftest import one_thread

__all__ = ["one_thread"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = 64

pytestmark = pytest.mark.gpu


def make_model(device: torch.device) -> TwoHeadCNN:
    """The same random weights on every device, and float32 as in the workers of a job."""
    disable_tf32()
    torch.manual_seed(0)
    return make_network().to(device)


def test_float32_is_float32() -> None:
    images, _, numbers = random_rows(256)
    with torch.inference_mode():
        exact = make_model(CPU).double()(prepare_images(images).double(), numbers)
        ours = make_model(CUDA)(prepare_images(images.to(CUDA)), numbers.to(CUDA))
    for logits, expected in zip(ours, exact, strict=True):
        assert (logits.cpu().double() - expected).abs().max() < 1e-4 * expected.abs().max()


def train(device: torch.device) -> Weights:
    """The weights after three steps."""
    model = make_model(device)
    optimizer = MuonAdamW(model, 0.01, bf16=False)
    optimizer.set_learning_rate(1e-3)
    objective = Objective(model, 0.05, bf16=False)
    images, digits, numbers = (values.to(device) for values in random_rows(ROWS))
    matrices = torch.from_numpy(distortions(0, 0, np.arange(ROWS), 0.5)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = objective(distort(prepare_images(images), matrices), numbers, digits, None)
        loss.backward(torch.tensor(1 / ROWS, device=device))
        optimizer.step()
    return copy_weights(model)


def test_three_steps_are_those_of_the_cpu() -> None:
    ours, theirs = train(CUDA), train(CPU)
    for name, start in copy_weights(make_model(CPU)).items():
        assert (ours[name] - theirs[name]).norm() < 0.02 * (theirs[name] - start).norm(), name


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_predictions_are_those_of_the_cpu(precision: str, tolerance: float) -> None:
    images, _, numbers = (values.numpy() for values in random_rows(1_000))
    weights = copy_weights(make_model(CPU))
    exact = Predictor(weights, CPU, "fp32", 50).predict(images, numbers, probabilities=True)
    predictor = Predictor(weights, CUDA, precision, None)
    ours = predictor.predict(images, numbers, probabilities=True)
    for name in ("pred_digit", "pred_sum"):
        different = np.mean(ours[name] != exact[name])
        assert different <= (0.05 if precision == "bf16" else 0)
    for name in ("digit_prob", "sum_prob", "digit_probs", "sum_probs"):
        expected = exact[name]
        assert np.allclose(ours[name], expected, rtol=tolerance, atol=tolerance), name
    assert len(predictor.predict(images[:0], numbers[:0])["pred_digit"]) == 0
