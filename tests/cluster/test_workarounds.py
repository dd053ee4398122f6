"""Private names of Ray, run against the installed one: a failure shows what has changed."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
from ray.data import Dataset
from ray.data._internal.execution.node_trackers import actor_location

from mnistsum_ray.cluster import workarounds
from mnistsum_ray.cluster.connection import connect, disconnect
from mnistsum_ray.training.ray_hooks import InterruptibleTrainer


def test_ray_train_still_has_the_hooks_and_the_callbacks_by_their_names(tmp_path: Path) -> None:
    theirs = ray.train.torch.TorchTrainer
    assert hasattr(theirs, "_register_sigint_handler"), "or Ctrl-C ends the driver with exit code 0"
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    left, all_of_them = (
        {type(callback) for callback in kind(lambda: None, **settings)._create_default_callbacks()}
        for kind in (InterruptibleTrainer, theirs)
    )
    # Else another Ray cluster on the machine ends the training.
    assert {kind.__name__ for kind in all_of_them - left} == {"PlacementGroupCleanerCallback"}


_CONSUME_SLOWLY = """
import time
import numpy as np
import ray
from mnistsum_ray.cluster.tasks import ray_data_options

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
with ray_data_options(preserve_order=True, object_store_bytes=4_000_000):
    dataset = ray.data.range(40, override_num_blocks=40).map_batches(lambda batch: {"x": np.zeros((1, 1_000_000), np.uint8)})
blocks = iter(dataset.iter_batches(batch_size=None))
next(blocks)
before = time.process_time()
for _ in range(10):
    time.sleep(0.5)
    next(blocks)
print(time.process_time() - before)
"""


@pytest.mark.slow
def test_an_execution_that_waits_for_its_consumer_does_not_spin() -> None:
    """Without `PatientExecution` it takes most of these five seconds of a core, in the process of the consumer."""
    done = subprocess.run([sys.executable, "-c", _CONSUME_SLOWLY], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.5, done.stderr


def test_a_name_that_ray_no_longer_has_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.delattr(actor_location, "get_or_create_actor_location_tracker")
    connect()
    workarounds.detached_data_actors()
    monkeypatch.delattr(Dataset, "copy")
    dataset = workarounds.in_order(ray.data.range(1))
    assert dataset.context.execution_options.preserve_order
    disconnect()
    monkeypatch.delattr(ray._private.utils, "read_ray_address")
    assert workarounds.last_cluster_address() is None
    workarounds.PatientExecution().on_execution_step(object())
