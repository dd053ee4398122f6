"""The network, its training steps and its predictions on a GPU, beside the same on the CPU.

Float32 on a GPU errs by 1e-5, TF32 by 1.6e-3: 1e-4 tells them apart.
"""

import numpy as np
import pytest
import torch

from mnistsum_ray.data.randomness import Draws
from mnistsum_ray.mnist.network import TwoHeadCNN, prepare_images
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model.device import disable_tf32
from mnistsum_ray.model.folder import Weights, copy_weights
from mnistsum_ray.model.inference import Predictor
from mnistsum_ray.task import Batch
from mnistsum_ray.training.worker import Objective
from tests.mnist import random_rows, task
from tests.model.conftest import one_thread

__all__ = ["one_thread"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = 64

pytestmark = pytest.mark.gpu


def make_model(device: torch.device) -> TwoHeadCNN:
    """The same random weights on every device, and float32 as in the workers of a job."""
    disable_tf32()
    torch.manual_seed(0)
    return TwoHeadCNN().eval().to(device)


def rows_on(device: torch.device, rows: int) -> Batch:
    return {key: values.to(device) for key, values in random_rows(rows).items()}


def test_float32_is_float32() -> None:
    with torch.inference_mode():
        exact_model, batch = make_model(CPU).double(), random_rows(256)
        digits = exact_model.digit_logits(prepare_images(batch["image"]).double())
        exact = (digits, exact_model.sum_logits(digits, batch["number"]))
        ours = make_model(CUDA)(rows_on(CUDA, 256))
    for logits, expected in zip(ours, exact, strict=True):
        assert (logits.cpu().double() - expected).abs().max() < 1e-4 * expected.abs().max()


def train(device: torch.device) -> Weights:
    """The weights after three steps."""
    network = make_model(device).train()
    smoothed = task(label_smoothing=0.05, distortion=0.5)
    optimizer = smoothed.optimizer(network, 0.01, bf16=False)
    objective = Objective(smoothed, network, bf16=False)
    batch = rows_on(device, ROWS)
    matrices = smoothed.augment({}, Draws(0, 0, np.arange(ROWS)))["affine"]
    batch["affine"] = torch.from_numpy(matrices).to(device)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["factor"]
    for _ in range(3):
        optimizer.zero_grad()
        (objective(batch, ROWS) / ROWS).backward()
        optimizer.step()
    return copy_weights(network)


def test_three_steps_are_those_of_the_cpu() -> None:
    ours, theirs = train(CUDA), train(CPU)
    for name, start in copy_weights(make_model(CPU)).items():
        assert (ours[name] - theirs[name]).norm() < 0.02 * (theirs[name] - start).norm(), name


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_predictions_are_those_of_the_cpu(precision: str, tolerance: float) -> None:
    rows = {name: random_rows(1_000)[name].numpy() for name in ("image", "number")}
    weights = copy_weights(make_model(CPU))
    exact = Predictor(MnistSum(), weights, CPU, "fp32", 50).predict(rows, probabilities=True)
    predictor = Predictor(MnistSum(), weights, CUDA, precision, None)
    ours = predictor.predict(rows, probabilities=True)
    for name in ("pred_digit", "pred_sum"):
        different = np.mean(ours[name] != exact[name])
        assert different <= (0.05 if precision == "bf16" else 0)
    for name in ("digit_prob", "sum_prob", "digit_probs", "sum_probs"):
        expected = exact[name]
        assert np.allclose(ours[name], expected, rtol=tolerance, atol=tolerance), name
    none = {name: values[:0] for name, values in rows.items()}
    assert len(predictor.predict(none)["pred_digit"]) == 0
