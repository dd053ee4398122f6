"""A workaround that no other test would miss: the others show in tests of what they are for."""

import subprocess
import sys

import pytest

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
