"""Batched prediction: the same for any batch size, for memory that may not be written, and from several threads at once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mnistsum_ray.model import int8
from mnistsum_ray.model.inference import Predictions, Predictor
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.serialization import copy_weights
from tests.model.test_optimizer import random_rows

ROWS = 300


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield Predictor(copy_weights(TwoHeadCNN()), torch.device("cpu"), "fp32", 64)
    torch.set_num_threads(threads)  # a Predictor sets it for the process


def rows(count: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, numbers and labels, one of them unknown."""
    images, digits, numbers = (values.numpy() for values in random_rows(count))
    digits[:1] = -1
    return images, numbers, digits


def equal(first: Predictions, second: Predictions) -> bool:
    return all(np.array_equal(values, second.values[name]) for name, values in first.values.items())


def test_two_threads_predict_what_one_does(predictor: Predictor) -> None:
    alone = predictor.predict(*rows())
    with ThreadPoolExecutor(2) as threads:
        for together in threads.map(lambda _: predictor.predict(*rows()), range(6)):
            assert equal(together, alone)


def test_memory_that_may_not_be_written_is_read(predictor: Predictor) -> None:
    frozen = rows()
    for values in frozen:
        values.flags.writeable = False
    assert equal(predictor.predict(*frozen), predictor.predict(*rows()))


def test_types_and_ranges(predictor: Predictor) -> None:
    images, numbers, labels = rows()
    found = predictor.predict(images, numbers, labels)
    assert [values.dtype for values in (found.digit, found.sum, found.digit_prob, found.sum_prob)] == ["i1", "i1", "f4", "f4"]
    assert 0 <= found.digit.min() <= found.digit.max() <= 9
    assert 0 <= found.sum.min() <= found.sum.max() <= 18
    for name in ("digit_nll", "sum_nll", "digit_brier", "sum_brier"):
        assert found.values[name][0] == 0, "its label is unknown"
        assert (found.values[name][1:] > 0).all()
    assert "digit_nll" not in predictor.predict(images, numbers).values
    assert len(predictor.predict(images[:0], numbers[:0]).digit) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(precision: str) -> None:
    if precision == "int8" and int8.unavailable_reason():
        pytest.skip("this PyTorch has no integer convolutions on this CPU")
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    model = TwoHeadCNN()
    images, numbers, _ = rows(256)
    calibration = None
    if precision == "int8":
        pixels = torch.from_numpy(images)
        calibration = int8.quantize(model, pixels, pixels, torch.from_numpy(numbers))["maxima"]
    predictor = Predictor(copy_weights(model), torch.device("cpu"), precision, 256, calibration)
    whole = predictor.predict(images, numbers)
    for size in range(1, 41):
        start = 3 * size  # a row is at another place of its batch, too
        part = predictor.predict(images[start : start + size], numbers[start : start + size])
        for name in ("digit", "sum", "digit_prob", "sum_prob"):
            expected = getattr(whole, name)[start : start + size]
            assert np.array_equal(getattr(part, name).view(np.uint8), expected.view(np.uint8)), (name, size)
    torch.set_num_threads(threads)
