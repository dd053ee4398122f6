"""Ray Train's private hooks that training/ray_hooks.py relies on."""

from pathlib import Path

import ray.train
import ray.train.torch

from mnistsum_ray.training.ray_hooks import InterruptibleTrainer


def test_ray_train_still_has_the_hooks_and_the_callbacks_by_their_names(tmp_path: Path) -> None:
    theirs = ray.train.torch.TorchTrainer
    assert hasattr(theirs, "_register_sigint_handler"), "or Ctrl-C ends the driver with exit code 0"
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    left, all_of_them = (
        [type(callback).__name__ for callback in kind(lambda: None, **settings)._create_default_callbacks()]
        for kind in (InterruptibleTrainer, theirs)
    )
    assert [name for name in all_of_them if name not in left] == ["PlacementGroupCleanerCallback", "DatasetsCallback"], (
        "InterruptibleTrainer must be adapted, or another Ray cluster on the machine ends the training"
    )
