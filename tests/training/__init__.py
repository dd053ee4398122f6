"""Tests of what trains, on a worker in this process."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import ray.train
import torch
from ray.train.torch import TorchTrainer

from mnistsum_ray.config import Hyperparameters, TrainConfig
from mnistsum_ray.data.decoding import RowTotals
from mnistsum_ray.data.sources import SPLITS, Source, open_source
from mnistsum_ray.mnist.task import MnistSettings, MnistSum
from mnistsum_ray.task import Task
from mnistsum_ray.training.progress import Events
from mnistsum_ray.training.request import check_request
from mnistsum_ray.training.worker import Worker

CPU = torch.device("cpu")
SILENT = Events(cast(Any, None), rank=1)
"""Events that go to nobody, as those of all ranks but 0."""

Result = TypeVar("Result")


class NoRows:
    """A shard without rows, of a test that gives them to the steps itself: it needs no cluster."""


def as_worker(function: Callable[[], Result], rows: Any = None) -> Result:
    """Call a function in this process as Ray Train calls it on a worker: its local mode.

    All splits have the same rows.
    """
    local = ray.train.ScalingConfig(num_workers=0)
    datasets = rows
    if not isinstance(rows, dict):
        datasets = dict.fromkeys(SPLITS, NoRows() if rows is None else rows)
    trainer = TorchTrainer(function, scaling_config=local, datasets=datasets)
    result: Result = trainer.fit().return_value
    return result


def mnist(**settings: Any) -> MnistSum:
    """The built-in task with the settings of a run with the bundled sample."""
    task = check_request(TrainConfig(data="sample", **settings)).task
    assert isinstance(task, MnistSum)
    return task


def open_data(data: object, **columns: str) -> Source:
    """What `--data` of the built-in task names; the columns' names as of its flags."""
    config, task = TrainConfig(data=str(data), **columns), MnistSum()
    find = partial(config.find_columns, task.training_columns)
    return open_source(task, str(data), find)


def hyperparameters(**settings: Any) -> Hyperparameters:
    """Those of a run with the bundled sample; settings of the task are left to `mnist`."""
    given = {key: value for key, value in settings.items() if key not in MnistSettings.model_fields}
    return check_request(TrainConfig(data="sample", **given)).hyperparameters


def new_worker(
    task: Task | None = None, totals: RowTotals | None = None, **settings: Any
) -> Worker:
    """A worker on the CPU; called within `as_worker`."""
    parameters = hyperparameters(**settings)
    totals = totals or RowTotals(0, 0)
    return Worker(task or mnist(**settings), parameters, totals, 32, CPU, "fp32", SILENT)
