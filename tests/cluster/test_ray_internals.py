"""The private APIs of Ray, run against the installed Ray: a failure shows what its version has changed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
from ray.data import Dataset
from ray.data._internal.execution.node_trackers import actor_location

from mnistsum_ray.cluster import ray_internals
from mnistsum_ray.cluster.connection import connect, disconnect
from mnistsum_ray.training.ray_hooks import InterruptibleTrainer, placement_groups, remove_placement_groups


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """A cluster of this process."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        connect()
    yield
    disconnect()


def test_ray_train_still_has_the_hooks_and_the_callbacks_by_their_names(tmp_path: Path) -> None:
    theirs = ray.train.torch.TorchTrainer
    assert hasattr(theirs, "_register_sigint_handler"), "or Ctrl-C ends the driver with exit code 0"
    settings = {"run_config": ray.train.RunConfig(storage_path=str(tmp_path))}
    left, all_of_them = (
        [type(callback).__name__ for callback in kind(lambda: None, **settings)._create_default_callbacks()]
        for kind in (InterruptibleTrainer, theirs)
    )
    assert [name for name in all_of_them if name not in left] == ["PlacementGroupCleanerCallback"], (
        "InterruptibleTrainer must be adapted, or another Ray cluster on the machine ends the training"
    )


@pytest.mark.usefixtures("started")
def test_placement_groups_that_ray_train_has_left_are_removed() -> None:
    """Those that were there before belong to the caller of `fit`, and stay."""
    rest = ray.cluster_resources()["CPU"] - 0.01
    of_caller = ray.util.placement_group([{"CPU": 0.01}])
    ray.get(of_caller.ready())
    before = placement_groups()
    ray.get(ray.util.placement_group([{"CPU": rest}]).ready())
    remove_placement_groups(but=before)
    assert ray.get(ray.remote(num_cpus=rest)(lambda: True).remote(), timeout=30)
    assert placement_groups() == before == {of_caller.id.hex()}
    ray.util.remove_placement_group(of_caller)


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


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("owner", "name", "call", "expected"),
    [
        (ray._private.utils, "read_ray_address", ray_internals.last_cluster_address, None),
        (actor_location, "get_or_create_actor_location_tracker", ray_internals.detached_data_actors, None),
        (Dataset, "copy", lambda: ray_internals.in_order(ray.data.range(1)).context.execution_options.preserve_order, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_that_ray_no_longer_has_is_done_without(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: Callable[[], object], expected: object
) -> None:
    monkeypatch.delattr(owner, name)
    assert call() == expected


def test_the_scheduling_loop_may_have_other_hooks_and_attributes() -> None:
    callback = ray_internals.PatientExecution()
    callback.on_execution_step(object())
    callback.a_new_hook("executor", "event")
