"""A trial of a task on a few rows, before Ray starts: does it keep its promises?"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from mnistsum_ray.data.columns.base import Arrays, Column
from mnistsum_ray.data.randomness import RowRandom
from mnistsum_ray.errors import RequestError, TaskError
from mnistsum_ray.model.calls import calling, forward
from mnistsum_ray.task import Batch, Task

_ROWS = 4

_KINDS = {"i": "whole numbers", "f": "floating-point numbers", "b": "booleans"}


def try_task(task: Task, network: nn.Module | None = None) -> tuple[str, ...]:
    """Run a task on random rows, on the CPU and in float32; return the names of its metrics.

    Without a network, which scoring has, what only training calls is tried too.

    RequestError: a method raises, or returns another thing than it should; or the network treats
    the rows of a batch together.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # a program's own draws stay
            if network is not None:
                return _try_scoring(task, network)
            with calling(task, "network"):
                network = task.network()
            _check(task, "network", isinstance(network, nn.Module), "must return a torch.nn.Module")
            names = _try_scoring(task, network.eval())
            _try_training(task, network)
            return names
    except TaskError as error:
        raise RequestError(str(error)) from error


def _try_scoring(task: Task, network: nn.Module) -> tuple[str, ...]:
    for name, layer in network.named_modules():
        is_batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        problem = f"has {type(layer).__name__} ({name}), by which the rows of a batch depend on "
        problem += "each other and on the number of workers; take GroupNorm or LayerNorm"
        _check(task, "network", not is_batch_norm, problem)
    batch = _tensors(_random_rows({**task.inputs, **task.labels}))
    outputs = forward(task, network, batch, bf16=False)
    with calling(task, "loss"):
        loss = task.loss(outputs, batch)
    _check_rows(task, "loss", loss, "f")
    with calling(task, "predict"):
        predicted = task.predict(outputs, batch)
    _check_predicted(task, predicted)
    _check_alone(task, network, batch, predicted)
    scalars = {name: values for name, values in predicted.items() if values.dim() == 1}
    with calling(task, "row_metrics"):  # scoring has lists only with `--probabilities`
        measured = task.row_metrics(scalars, batch)
    _check(task, "row_metrics", isinstance(measured, dict), "must return a dict of tensors")
    for name, values in measured.items():
        _check_rows(task, f"row_metrics[{name!r}]", values, "fib")
    return tuple(measured)


def _try_training(task: Task, network: nn.Module) -> None:
    rows = _random_rows(task.training_columns)
    with calling(task, "augment"):
        augmented = task.augment(dict(rows), RowRandom(0, 0, np.arange(_ROWS)))
    _check(task, "augment", isinstance(augmented, dict), "must return a dict of arrays")
    missing = {*task.inputs, *task.labels} - {*augmented}
    _check(task, "augment", not missing, f"must return all columns, and lacks {sorted(missing)}")
    for key, array in augmented.items():
        is_whole = isinstance(array, np.ndarray) and len(array) == _ROWS
        _check(task, f"augment[{key!r}]", is_whole, f"must be an array of {_ROWS} for {_ROWS} rows")
    batch = _tensors(rows)
    outputs = forward(task, network, batch, bf16=False)
    with calling(task, "evaluate"):
        found = task.evaluate(network, outputs, batch)
    for name, values in found.items():
        _check_rows(task, f"evaluate[{name!r}]", values, "fib")
    _check(task, "evaluate", "loss" in found, "must return a 'loss'")


def _random_rows(columns: Mapping[str, Column]) -> Arrays:
    generator = np.random.default_rng(0)
    return {key: column.random(_ROWS, generator) for key, column in columns.items()}


def _tensors(rows: Arrays) -> Batch:
    return {key: torch.from_numpy(values) for key, values in rows.items()}


def _check(task: Task, method: str, is_right: bool, promise: str) -> None:
    if not is_right:
        raise TaskError(f"task {task.name}: {method} {promise}")


def _check_rows(task: Task, what: str, values: Any, kinds: str, dimensions: int = 1) -> None:
    """Check that a method has returned a tensor [n], or [n, length], of some kinds."""
    wanted = " or ".join(_KINDS[kind] for kind in kinds)
    shape = f"[{_ROWS}]" if dimensions == 1 else f"[{_ROWS}, length]"
    promise = f"must return a tensor of {wanted} {shape} for {_ROWS} rows"
    _check(task, what, isinstance(values, Tensor), f"{promise}, not {type(values).__name__}")
    has_shape = values.dim() == dimensions and len(values) == _ROWS
    kind = "f" if values.is_floating_point() else "b" if values.dtype == torch.bool else "i"
    found = f"{str(values.dtype).removeprefix('torch.')}{list(values.shape)}"
    _check(task, what, has_shape and kind in kinds, f"{promise}, not {found}")


def _check_predicted(task: Task, predicted: Any) -> None:
    _check(task, "predict", isinstance(predicted, dict), "must return a dict of tensors")
    names = f"{sorted(task.outputs.names)}, not {sorted(predicted)}"
    is_whole = {*task.outputs.names} == {*predicted}
    _check(task, "predict", is_whole, f"must return the columns of outputs: {names}")
    for field in task.outputs:
        is_list = pa.types.is_list(field.type)
        if pa.types.is_string(field.type):  # the number of a class
            _check_rows(task, f"predict[{field.name!r}]", predicted[field.name], "i")
            continue
        kind = np.dtype((field.type.value_type if is_list else field.type).to_pandas_dtype()).kind
        kind = "i" if kind == "u" else kind
        what = f"predict[{field.name!r}]"
        _check_rows(task, what, predicted[field.name], kind, 2 if is_list else 1)


def _check_alone(task: Task, network: nn.Module, batch: Batch, predicted: dict[str, Any]) -> None:
    """Check that rows have the same predictions in the company of others."""
    order = torch.tensor([1, 0, 0, 1])
    others = {key: values[order] for key, values in batch.items()}
    with calling(task, "predict"):
        again = task.predict(forward(task, network, others, bf16=False), others)
    for name, values in predicted.items():
        if not values.is_floating_point():
            continue
        is_same = torch.allclose(again[name], values[order], rtol=1e-3, atol=1e-4, equal_nan=True)
        problem = "must treat each row alone: in the company of other rows a row has another "
        _check(task, "network", is_same, f"{problem}{name}")
