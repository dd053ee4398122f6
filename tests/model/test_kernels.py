"""A training step of so small a network takes as long on a GPU as its kernels take to launch: they are counted, on a CPU."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.model import muon
from mnistsum_ray.model.augmentation import distort
from mnistsum_ray.model.loss import Objective, dropout_factors
from mnistsum_ray.model.network import TwoHeadCNN, prepare_images
from mnistsum_ray.model.optimizer import MuonAdamW
from tests.model.test_optimizer import random_rows


class CallCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of ATen that compute something: views do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def make_step(recipe: str, dtype: torch.dtype) -> Callable[[], None]:
    """A training step as `Trainer` does it."""
    rows = 32
    images, digits, numbers = random_rows(rows)
    matrices = torch.from_numpy(distortions(0, 0, np.arange(rows), 1.0))
    model = TwoHeadCNN()
    optimizer = MuonAdamW(model, weight_decay=0.01)
    objective = Objective(model, 0.05 if recipe == "long" else 0.0, dtype)
    generator, scale = torch.Generator(), torch.tensor(1 / rows)

    def step() -> None:
        optimizer.zero_grad()
        dropout = dropout_factors(rows, 0.25, generator.manual_seed(0)) if recipe == "long" else None
        loss, _ = objective(distort(prepare_images(images), matrices), numbers, digits, dropout)
        loss.backward(scale)
        optimizer.step(1e-3, dtype)

    return step


@pytest.mark.parametrize(("recipe", "limit"), [("short", 120), ("long", 150)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_calls_of_a_step(recipe: str, limit: int, dtype: torch.dtype) -> None:
    step = make_step(recipe, dtype)
    step()  # the first step makes AdamW's state
    with CallCounter() as counter:
        step()
    total = counter.calls.total()
    assert total <= limit, counter.calls
    assert total > limit - 30, "the limit should follow what is reached"
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(counter.calls), "waits for the device"


def test_a_gpu_orthogonalizes_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_ROW_STEP", muon._ROW_STEP_CUDA)
    step = make_step("short", torch.bfloat16)
    step()
    with CallCounter() as counter:
        step()
    assert counter.calls["aten::bmm"] == 5
    assert counter.calls.total() <= 102, counter.calls
