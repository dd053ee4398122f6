"""Batched prediction: types, and the same bits in any batch, thread and memory."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.inference import Predictions, Predictor
from tests.model import new_model, random_rows

ROWS = 20


def equal(first: Predictions, second: Predictions) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(values.view(np.uint8), second[name].view(np.uint8))
        for name, values in first.items()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch_thread_and_memory(precision: str) -> None:
    images, _, numbers = (values.numpy() for values in random_rows(ROWS))
    ours = Predictor(copy_weights(new_model()), torch.device("cpu"), precision, 8)
    whole = ours.predict(images, numbers, probabilities=True)
    for size in (1, 8, 9):
        some = slice(1 + size, 1 + 2 * size)  # a row is at another place of its batch, too
        found = ours.predict(images[some], numbers[some], probabilities=True)
        assert equal(found, {name: values[some] for name, values in whole.items()}), size
    for values in (images, numbers):
        values.flags.writeable = False
    with ThreadPoolExecutor(2) as pool:
        found_by = [*pool.map(lambda _: ours.predict(images, numbers), range(4))]
    assert all(equal(together, whole) for together in found_by)
    for head in HEADS:
        every, best = whole[f"{head.name}_probs"], whole[f"{head.name}_prob"]
        which = whole[f"pred_{head.name}"]
        assert [values.dtype for values in (every, best, which)] == ["f4", "f4", "i1"]
        assert every.shape == (ROWS, head.classes)
        assert np.array_equal(every[range(ROWS), which], best)
        assert np.allclose(every.sum(1), 1, atol=1e-5)
    assert len(ours.predict(images[:0], numbers[:0])["pred_digit"]) == 0
