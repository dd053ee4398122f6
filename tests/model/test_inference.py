"""Batched prediction: types, and the same bits in any batch, thread and memory."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.inference import Predictions, Predictor
from tests.model import new_model, random_rows


def predictor(precision: str = "fp32", batch_size: int = 16) -> Predictor:
    return Predictor(copy_weights(new_model()), torch.device("cpu"), precision, batch_size)


def rows(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Images and numbers."""
    images, _, numbers = random_rows(count)
    return images.numpy(), numbers.numpy()


def equal(first: Predictions, second: Predictions) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(values.view(np.uint8), second[name].view(np.uint8))
        for name, values in first.items()
    )


def test_several_threads_and_memory_that_may_not_be_written() -> None:
    ours, frozen = predictor(), rows()
    alone = ours.predict(*rows())
    for values in frozen:
        values.flags.writeable = False
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda _: ours.predict(*frozen), range(4))]
    assert all(equal(together, alone) for together in found)
    types = [alone[name].dtype for name in ("pred_digit", "pred_sum", "digit_prob")]
    assert types == ["i1", "i1", "f4"]
    assert len(ours.predict(frozen[0][:0], frozen[1][:0])["pred_digit"]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(precision: str) -> None:
    images, numbers = rows()
    ours = predictor(precision, 8)
    whole = ours.predict(images, numbers, probs=True)
    for size in (1, 8, 9):
        start = 1 + size  # a row is at another place of its batch, too
        some = slice(start, start + size)
        found = ours.predict(images[some], numbers[some], probs=True)
        assert equal(found, {name: values[some] for name, values in whole.items()}), size
    for head in HEADS:
        every, best = whole[f"{head.name}_probs"], whole[f"{head.name}_prob"]
        which = whole[f"pred_{head.name}"]
        assert (str(every.dtype), every.shape) == ("float32", (20, head.classes))
        assert np.array_equal(every[range(20), which], best)
        assert np.allclose(every.sum(1), 1, atol=1e-5)
