"""Batched prediction: types, and the same bits in any batch, thread and memory."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import pytest
import torch

from mnistsum_ray import Images, Numbers
from mnistsum_ray.data.columns.base import Arrays
from mnistsum_ray.errors import TaskError
from mnistsum_ray.mnist.task import MnistSum
from mnistsum_ray.model.calls import forward, map_tensors
from mnistsum_ray.model.folder import copy_weights
from mnistsum_ray.model.inference import Predictor, default_batch_size
from tests.mnist import new_model, random_rows
from tests.tasks import Points, points

ROWS = 20


def equal(first: Arrays, second: Arrays) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(values.view(np.uint8), second[name].view(np.uint8))
        for name, values in first.items()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch_thread_and_memory(precision: str) -> None:
    rows = {name: random_rows(ROWS)[name].numpy() for name in ("image", "number")}
    ours = Predictor(MnistSum(), copy_weights(new_model()), torch.device("cpu"), precision, 8)
    whole = ours.predict(rows, probabilities=True)

    def predict(start: int, end: int, probabilities: bool = False) -> Arrays:
        some = {name: values[start:end] for name, values in rows.items()}
        return ours.predict(some, probabilities=probabilities)

    for size in (1, 8, 9):  # a row is at another place of its batch, too
        found = predict(1 + size, 1 + 2 * size, probabilities=True)
        expected = {name: values[1 + size : 1 + 2 * size] for name, values in whole.items()}
        assert equal(found, expected), size
    for values in rows.values():
        values.flags.writeable = False
    with ThreadPoolExecutor(2) as pool:
        found_by = [*pool.map(lambda _: predict(0, ROWS), range(4))]
    assert all(equal(together, whole) for together in found_by)
    for head, classes in (("digit", 10), ("sum", 19)):
        every, best = whole[f"{head}_probs"], whole[f"{head}_prob"]
        which = whole[f"pred_{head}"]
        assert [values.dtype for values in (every, best, which)] == ["f4", "f4", "i1"]
        assert every.shape == (ROWS, classes)
        assert np.array_equal(every[range(ROWS), which], best)
        assert np.allclose(every.sum(1), 1, atol=1e-5)
    assert len(predict(0, 0)["pred_digit"]) == 0


class Large(Points):
    inputs: ClassVar = {"one": Images(512, 512, "RGB"), "two": Numbers(1000)}


def test_a_batch_of_large_rows_has_fewer() -> None:
    sizes = [
        default_batch_size(task, torch.device(device))
        for task in (Points(), Large())
        for device in ("cpu", "cuda")
    ]
    assert sizes == [256, 2048, 5, 84]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_outputs_of_any_form_become_float32_and_an_error_names_task_and_method() -> None:
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    outputs = {"a": [half, whole], "b": (half,), "c": Pair(half, whole), "d": "text"}

    def network(_: object) -> object:
        return outputs

    found = forward(Points(), cast(Any, network), points(2), bf16=False)
    assert [tensor.dtype for tensor in found["a"]] == [torch.float32, torch.int64]
    assert (found["b"][0].dtype, found["c"].first.dtype) == (torch.float32, torch.float32)
    assert (type(found["b"]), type(found["c"]), found["d"]) == (tuple, Pair, "text")
    assert torch.equal(map_tensors(torch.neg, half), -half)
    said = "^task points: network raised KeyError: 'place'$"
    with pytest.raises(TaskError, match=said):
        forward(Points(), Points().network(), {"side": torch.zeros(1)}, bf16=False)
