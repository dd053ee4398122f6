"""The workers that a job reserves on different clusters, and requests that none can meet."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import (
    ClusterResources,
    Gpu,
    WorkerPlan,
    WorkerRequest,
    plan_workers,
)
from mnistsum_ray.errors import RequestError


def cluster(cpus: float, gpus: float = 0, nodes: int = 1, grows: bool = False) -> ClusterResources:
    node = {"CPU": cpus / nodes} | ({"GPU": gpus / nodes} if gpus else {})
    return ClusterResources((node,) * nodes if cpus or gpus else (), grows)


def plan(here: ClusterResources, gpu_gib: int = 16, **request: Any) -> WorkerPlan:
    has_gpu = here.total("GPU") and request.get("use_gpu") is not False
    gpu = Gpu(bf16=True, memory_bytes=gpu_gib * 2**30) if has_gpu else None
    given = {"workers": None, "use_gpu": None, "wait_seconds": 0, "useful_gpus": 256} | request
    return plan_workers(WorkerRequest(**given), here, gpu)


TRAINING: list[Any] = [
    (cluster(2), {}, (1, 1), {"CPU": 0.75}),  # a laptop
    (cluster(16, 1), {}, (1, 1), {"GPU": 1}),  # one GPU box
    (cluster(64, 8, nodes=2), {}, (8, 8), {"GPU": 1}),  # a GPU cluster
    (cluster(64, 8), {"useful_gpus": 2}, (2, 2), {"GPU": 1}),  # with more than enough of them
    (cluster(64, 8), {"useful_gpus": 2, "workers": (8, 8)}, (8, 8), {"GPU": 1}),
    (cluster(32, nodes=4), {}, (4, 4), {"CPU": 0.75}),  # CPUs only: one worker per node
    (cluster(0, grows=True), {}, (1, 1), {"CPU": 0.75}),  # nodes come for it
    (cluster(2, grows=True), {"workers": (2, 4), "use_gpu": True}, (2, 4), {"GPU": 1}),
]


@pytest.mark.parametrize(("here", "request_", "workers", "per_worker"), TRAINING)
def test_training(here: ClusterResources, request_: Any, workers: Any, per_worker: Any) -> None:
    made = plan(here, group=True, **request_)
    assert (made.worker_range, made.per_worker) == (workers, per_worker)
    assert here.can_grow or here.workers_that_fit(per_worker) >= workers[0]


SCORING: list[Any] = [
    (cluster(2), 0, {}, 2, {"CPU": 1}),  # a laptop
    (cluster(16, 1), 80, {}, 8, {"GPU": 1 / 8}),  # one GPU box: eight processes share the card
    (cluster(16, 1), 16, {}, 4, {"GPU": 1 / 4}),  # its memory holds four
    (cluster(2, 1), 80, {}, 2, {"GPU": 1 / 2}),  # two cores feed it
    (cluster(16, 1), 80, {"workers": (1, 1)}, 1, {"GPU": 1}),
    (cluster(16, 8), 80, {"workers": (3, 3)}, 3, {"GPU": 1}),  # three of the cards
    (cluster(16, 1), 0, {"use_gpu": False}, 16, {"CPU": 1}),
    # What a cluster may grow to counts.
    (cluster(0, grows=True), 0, {"use_gpu": True}, 16, {"GPU": 1}),
    (cluster(2, grows=True), 0, {}, 128, {"CPU": 1}),
]


@pytest.mark.parametrize(("here", "gib", "request_", "workers", "per_worker"), SCORING)
def test_scoring(here: Any, gib: int, request_: Any, workers: int, per_worker: Any) -> None:
    """It uses the whole cluster."""
    made = plan(here, gib, **request_)
    assert (made.worker_range, made.per_worker) == ((1, workers), per_worker)


@pytest.mark.parametrize("group", [True, False])
def test_more_than_a_cluster_of_this_job_has_is_refused(group: bool) -> None:
    where = r"\(2 CPUs and 0 GPUs on 1 node\)"
    said = f"--num-workers 3: only 2 of them, with .* each, fit on the nodes {where}"
    with pytest.raises(RequestError, match=said):
        plan(cluster(2), group=group, workers=(3, 3))
    with pytest.raises(RequestError, match=f"--use-gpu true: the cluster has no GPU {where}"):
        plan(cluster(2), group=group, use_gpu=True)
