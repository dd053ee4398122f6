"""Ray Train's private hooks that training/worker.py relies on."""

import inspect
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from mnistsum_ray.training.worker import InterruptibleTrainer, worker_error


def test_ray_train_still_asks_for_its_sigint_handler_by_this_name() -> None:
    source = inspect.getsource(DataParallelTrainer)
    assert "def _register_sigint_handler(self, controller" in source, (
        f"Ray {ray.__version__}: DataParallelTrainer._register_sigint_handler is gone; InterruptibleTrainer must be adapted, or "
        "Ctrl-C ends the driver with exit code 0"
    )
    assert "self._register_sigint_handler(" in source, f"Ray {ray.__version__} no longer calls _register_sigint_handler"


def test_ray_train_still_has_a_cleaner_that_is_left_out_by_this_name(tmp_path: Path) -> None:
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    names = [
        [type(callback).__name__ for callback in kind(lambda: None, **settings)._create_default_callbacks()]
        for kind in (ray.train.torch.TorchTrainer, InterruptibleTrainer)
    ]
    assert [name for name in names[0] if name not in names[1]] == ["PlacementGroupCleanerCallback"], (
        f"Ray {ray.__version__}: InterruptibleTrainer must be adapted, or another Ray cluster on the machine ends the training"
    )


def test_the_workers_own_exception_can_be_had() -> None:
    assert worker_error(ValueError("plain")).args == ("plain",)
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    error = UserExceptionWithTraceback(ValueError("of the worker"), traceback_str="")
    assert str(worker_error(error)) == "of the worker", (
        f"Ray {ray.__version__}: UserExceptionWithTraceback._base_exc is gone; worker.worker_error must be adapted, or the "
        "console names a file of Ray instead of the worker's error"
    )
    assert issubclass(WorkerGroupError, Exception)
