"""Private names of Ray, run against the installed one: a failure shows what has changed."""

import pytest
import ray
import ray.train
from ray.data import Dataset
from ray.data._internal.execution.node_trackers import actor_location

from mnistsum_ray.cluster import workarounds


def test_a_name_that_ray_no_longer_has_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error")
    monkeypatch.delattr(actor_location, "get_or_create_actor_location_tracker")
    workarounds.detached_data_actors()
    monkeypatch.delattr(Dataset, "copy")
    dataset = workarounds.in_order(ray.data.range(1))
    assert dataset.context.execution_options.preserve_order
    monkeypatch.delattr(ray._private.utils, "read_ray_address")
    assert workarounds.last_cluster_address() is None
    ray.shutdown()
