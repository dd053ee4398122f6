"""Private names of Ray, run against the installed one: a failure shows what has changed."""

import subprocess
import sys

import pytest
import ray
import ray.train
from ray.data import Dataset
from ray.data._internal.execution.node_trackers import actor_location

from mnistsum_ray.cluster import workarounds

_CONSUME_SLOWLY = """
import time
import numpy as np
import ray
from mnistsum_ray.cluster.nodes import set_data_options

def make(batch):
    return {"x": np.zeros((1, 1_000_000), np.uint8)}

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
dataset = ray.data.range(40, override_num_blocks=40)
set_data_options(dataset, preserve_order=True, object_store_bytes=4_000_000)
blocks = iter(dataset.map_batches(make).iter_batches(batch_size=None))
next(blocks)
before = time.process_time()
for _ in range(10):
    time.sleep(0.5)
    next(blocks)
print(time.process_time() - before)
"""


@pytest.mark.slow
def test_an_execution_that_waits_for_its_consumer_does_not_spin() -> None:
    """Without `PatientExecution` it takes most of these five seconds of the consumer's core."""
    command = [sys.executable, "-c", _CONSUME_SLOWLY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.5, done.stderr


def test_a_name_that_ray_no_longer_has_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error")
    monkeypatch.delattr(actor_location, "get_or_create_actor_location_tracker")
    workarounds.detached_data_actors()
    monkeypatch.delattr(Dataset, "copy")
    dataset = workarounds.in_order(ray.data.range(1))
    assert dataset.context.execution_options.preserve_order
    monkeypatch.delattr(ray._private.utils, "read_ray_address")
    assert workarounds.last_cluster_address() is None
    workarounds.PatientExecution().on_execution_step(object())
    ray.shutdown()
