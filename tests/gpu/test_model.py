"""Predictions on a GPU, beside the same on the CPU.

Float32 on a GPU errs by 1e-5, TF32 by 1.6e-3: 1e-4 tells them apart.
"""

import numpy as np
import pytest
import torch

from mnistsum_ray.mnist.network import TwoHeadCNN
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model.device import disable_tf32
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.inference import Predictor
from tests.mnist import random_rows
from tests.model.conftest import one_thread

__all__ = ["one_thread"]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.gpu


def make_model(device: torch.device) -> TwoHeadCNN:
    """The same random weights on every device, and float32 as in the workers of a job."""
    disable_tf32()
    torch.manual_seed(0)
    return TwoHeadCNN().eval().to(device)


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
