"""Ray Train's private hooks that training/worker.py relies on."""

import inspect
from pathlib import Path

import ray.train
import ray.train.torch
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mnistsum_ray.training.worker import InterruptibleTrainer


def test_ray_train_still_asks_for_its_sigint_handler_by_this_name() -> None:
    source = inspect.getsource(DataParallelTrainer)
    for line in ("def _register_sigint_handler(self, controller", "self._register_sigint_handler("):
        assert line in source, "InterruptibleTrainer must be adapted, or Ctrl-C ends the driver with exit code 0"


def test_ray_train_still_has_the_callbacks_that_are_left_out_by_their_names(tmp_path: Path) -> None:
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    ours, rays = (
        [type(callback).__name__ for callback in kind(lambda: None, **settings)._create_default_callbacks()]
        for kind in (InterruptibleTrainer, ray.train.torch.TorchTrainer)
    )
    assert [name for name in rays if name not in ours] == ["PlacementGroupCleanerCallback", "DatasetsCallback"], (
        "InterruptibleTrainer must be adapted, or another Ray cluster on the machine ends the training"
    )
