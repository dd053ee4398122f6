"""Inference: batched prediction on a device, and predictions as columns of a table."""

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from mnistsum_ray.data.columns.base import Array, Arrays, Reasons, rows_in
from mnistsum_ray.errors import RunError
from mnistsum_ray.model.calls import calling, forward
from mnistsum_ray.model.device import array_to_device, disable_tf32, tune_malloc
from mnistsum_ray.task import Task

CPU_BATCH: Final = 256
"""Rows of a forward pass on CPUs: 3 to 7 % faster than 64 on two cores, and as fast as more."""
GPU_BATCH: Final = 2048

_BATCH_BYTES: Final = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Most bytes of a batch by default: the values that a network makes of a row are many more."""


def clashing_column(task: Task, names: list[str], *, probabilities: bool) -> str | None:
    """Return the first column of a table whose name an added column would have too, or None.

    Upper and lower case are one: DuckDB and Spark do not tell them apart.
    """
    added = {field.name.lower() for field in added_fields(task, probabilities=probabilities)}
    return next((name for name in names if name.lower() in {*added, "reason"}), None)


def added_fields(task: Task, *, probabilities: bool) -> list[pa.Field]:
    """Return the columns of a task's outputs; its lists only with `probabilities`."""
    return [one for one in task.outputs if probabilities or not pa.types.is_list(one.type)]


def append_predictions(
    task: Task, table: pa.Table, predictions: Arrays, reasons: Reasons
) -> pa.Table:
    """Return the table of these rows, and after its columns those that scoring adds.

    `reasons` say of rows why they cannot be scored: their predictions are null.

    RunError: a prediction of another row is infinite or NaN.
    """
    reason_column = pa.array([reasons.get(row) for row in range(table.num_rows)], pa.string())
    is_rejected = reason_column.is_valid()
    mask = is_rejected.to_numpy(zero_copy_only=False)
    for field in task.outputs:
        if field.name not in predictions:  # lists that nobody has asked for
            continue
        values = predictions[field.name]
        if pa.types.is_string(field.type):
            names = task.labels[field.name.removeprefix("pred_")].class_names
            values = np.array(names, object)[values]
        if values.dtype.kind == "f" and not np.isfinite(values[~mask]).all():
            problem = f"{field.name} is infinite or NaN for some row; train again"
            raise RunError(f"task {task.name}: {problem}")
        if pa.types.is_list(field.type):
            rows, length = values.shape
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * length)
            flat = pa.array(values.reshape(-1), field.type.value_type)
            lists = pa.ListArray.from_arrays(offsets, flat, type=field.type, mask=is_rejected)
            table = table.append_column(field, lists)
        else:
            table = table.append_column(field, pa.array(values, field.type, mask=mask))
    return table.append_column("reason", reason_column)


class Predictor:
    """A task's network on one device. PyTorch's settings change with it: a process has one."""

    def __init__(
        self,
        task: Task,
        weights: dict[str, Tensor],
        device: torch.device,
        precision: str,
        batch_size: int | None,
    ) -> None:
        if device.type == "cpu":
            tune_malloc()
            # One process a core is faster than several threads, which wait for each other.
            torch.set_num_threads(1)
        disable_tf32()
        self.task = task
        self._network = task.network()
        self._network.load_state_dict(weights)
        self._network.eval().to(device)
        self._bf16 = precision == "bf16"
        self.batch_size = batch_size or default_batch_size(task, device)
        # A device that does not work, or a batch too large for its memory, fails here.
        columns = task.inputs.items()
        self.predict({key: column.load(column.zeros(self.batch_size)) for key, column in columns})

    def predict(self, rows: Arrays, *, probabilities: bool = False) -> Arrays:
        return predict_rows(
            self.task,
            self._network,
            rows,
            self.batch_size,
            probabilities=probabilities,
            bf16=self._bf16,
        )


def default_batch_size(task: Task, device: torch.device) -> int:
    """Return rows of a forward pass on this device."""
    most = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    return min(most, rows_in(_BATCH_BYTES[device.type], task.inputs.values()))


@torch.inference_mode()
def predict_rows(
    task: Task,
    network: nn.Module,
    rows: Arrays,
    batch_size: int,
    *,
    probabilities: bool = False,
    bf16: bool = False,
) -> Arrays:
    """Predict rows, inputs as batches have them, by column of `outputs`.

    The last batch is filled up with zeros: kernels are chosen by the size of a batch, so a row has
    the same bits whatever rows are scored with it.
    """
    device = device_of(network)
    names = [field.name for field in added_fields(task, probabilities=probabilities)]
    count = len(next(iter(rows.values())))
    found: dict[str, list[Array]] = {name: [] for name in names}
    for start in range(0, max(1, count), batch_size):
        batch = {}
        for key in task.inputs:
            values = rows[key][start : start + batch_size]
            missing = batch_size - len(values)
            if missing:
                zeros = np.zeros((missing, *values.shape[1:]), values.dtype)
                values = np.concatenate([values, zeros])
            batch[key] = array_to_device(values, device)
        outputs = forward(task, network, batch, bf16=bf16)
        with calling(task, "predict"):
            predicted = task.predict(outputs, batch)
        for name in names:
            found[name].append(predicted[name][: count - start].cpu().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def sum_metrics(
    task: Task, predictions: Arrays, rows: Arrays, is_labelled: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """Return sums of `row_metrics` over the labelled rows."""
    batch = {key: torch.from_numpy(values[is_labelled]) for key, values in rows.items()}
    predicted = {key: torch.from_numpy(values[is_labelled]) for key, values in predictions.items()}
    with calling(task, "row_metrics"):
        measured = task.row_metrics(predicted, batch)
    return {name: float(values.double().sum()) for name, values in measured.items()}


def device_of(network: nn.Module) -> torch.device:
    """Return where the parameters of a network are."""
    return next(network.parameters(), torch.zeros(())).device
