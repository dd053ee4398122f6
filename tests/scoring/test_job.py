"""The workers that score on different clusters, and requests that none can meet."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.job import plan_workers

LAPTOP, HEAD = ({"CPU": 2.0},), ({"CPU": 0.0},)
GPU_BOX, GPU_NODE = {"CPU": 16.0, "GPU": 1.0}, {"CPU": 96.0, "GPU": 8.0}
CPU = {"CPU": 1.0}
GROWS = {"grows": True}

PLANS: list[tuple[Any, dict[str, Any], int, dict[str, float]]] = [
    (LAPTOP, {}, 2, CPU),
    (({"CPU": 2.5}, {"CPU": 4.0}), {}, 6, CPU),
    ((GPU_BOX,), {}, 4, {"GPU": 1 / 4}),
    ((GPU_BOX,), {"num_workers": 1}, 1, {"GPU": 1}),
    ((GPU_BOX,), {"use_gpu": False}, 16, CPU),
    ((GPU_NODE, GPU_NODE, *LAPTOP), {}, 64, {"GPU": 1 / 4}),
    ((GPU_NODE,), {"num_workers": 8}, 8, {"GPU": 1}),
    ((GPU_NODE,), {"num_workers": 20}, 20, {"GPU": 1 / 3}),
    # A cluster that may grow counts as it is now.
    (HEAD, GROWS, 1, CPU),
    (HEAD, GROWS | {"num_workers": 64}, 64, CPU),
    (HEAD, GROWS | {"use_gpu": True}, 1, {"GPU": 1 / 4}),
    (HEAD, GROWS | {"use_gpu": True, "num_workers": 8}, 8, {"GPU": 1 / 4}),
]


def plan(nodes: Any, grows: bool = False, **given: Any) -> WorkerPlan:
    config = ScoreConfig(model="m", input=("i",), output="o", **given)
    cluster = ClusterResources(nodes, grows)
    has_gpu = cluster.total("GPU") > 0 and config.use_gpu is not False
    return plan_workers(config, cluster, has_gpu=has_gpu)


@pytest.mark.parametrize(("nodes", "given", "most", "per_worker"), PLANS)
def test_workers_are_as_many_as_the_cluster_has_or_as_were_asked_for(
    nodes: Any, given: Any, most: int, per_worker: Any
) -> None:
    assert plan(nodes, **given) == WorkerPlan(1, most, per_worker, threads=None)


def test_a_gpu_takes_as_many_as_share_it() -> None:
    for number in (1, 2, 3, 4):
        share = round(1 / number, 4)  # as Ray does
        assert ClusterResources(({"GPU": 1.0},)).workers_that_fit({"GPU": share}) == number


def test_more_than_a_cluster_of_this_job_has_is_refused() -> None:
    said = r"--num-workers 3: only 2 of them fit, with 1 CPU each \(2 CPUs and 0 GPUs on 1 node\)"
    with pytest.raises(RequestError, match=said):
        plan(LAPTOP, num_workers=3)
