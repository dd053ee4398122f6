"""Tests of what trains, on a worker in this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import ray.train
import torch
from ray.train.torch import TorchTrainer

from mnistsum_ray.config import Hyperparameters, TrainConfig
from mnistsum_ray.data.randomness import RowTotals
from mnistsum_ray.data.sources import SPLITS
from mnistsum_ray.training.progress import Events
from mnistsum_ray.training.run import check_request
from mnistsum_ray.training.trainer import Trainer

CPU = torch.device("cpu")
SILENT = Events(cast(Any, None), rank=1)
"""Events that go to nobody, as those of all ranks but 0."""

Result = TypeVar("Result")


class NoRows:
    """A shard without rows, of a test that gives them to the steps itself: it needs no cluster."""

    def materialize(self) -> "NoRows":
        return self

    def count(self) -> int:
        return 0


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


def hyperparameters(**settings: Any) -> Hyperparameters:
    """Those of a run with the bundled sample."""
    return check_request(TrainConfig(data="sample", **settings)).hyperparameters


def new_trainer(**settings: Any) -> Trainer:
    """The trainer of a worker on the CPU; called within `as_worker`."""
    parameters = replace(hyperparameters(**settings), precision="fp32")
    return Trainer(parameters, RowTotals(0, 0), CPU, "fp32", SILENT)
