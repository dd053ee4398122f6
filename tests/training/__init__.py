"""Tests of what trains, on workers in this process and in others."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray.train
import torch
from mnistsum_ray.training.preflight import preflight
from mnistsum_ray.training.worker import Worker
from ray.train.torch import TorchTrainer

from mnistsum_ray.config import TrainConfig
from mnistsum_ray.training.trainer import Trainer

CPU = torch.device("cpu")

Result = TypeVar("Result")


def as_worker(function: Callable[[], Result]) -> Result:
    """Call a function in this process as Ray Train calls it on a worker: its local mode."""
    local = ray.train.ScalingConfig(num_workers=0)
    result: Result = TorchTrainer(function, scaling_config=local).fit().return_value
    return result


def new_trainer(rank: int = 0, world_size: int = 1, **settings: Any) -> Trainer:
    """The trainer of a worker on the CPU, for the bundled sample; called within `as_worker`."""
    hyperparameters = preflight(TrainConfig(data="sample", **settings)).hyperparameters
    return Trainer(hyperparameters, Worker(rank, world_size, CPU, events=None), "fp32")
