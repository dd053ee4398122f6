"""The workers that a job reserves on clusters of different sizes, and requests that no cluster can meet."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import ClusterResources, Gpu, WorkerPlan, WorkerRequest, plan_workers
from mnistsum_ray.errors import RequestError
from mnistsum_ray.training.resources import check_share

A_GPU = Gpu(bf16=True, memory_bytes=16 * 2**30)


def cluster(cpus: float, gpus: float = 0, nodes: int = 1, *, grows: bool = False) -> ClusterResources:
    node = {"CPU": cpus / nodes} | ({"GPU": gpus / nodes} if gpus else {})
    return ClusterResources((node,) * nodes if cpus or gpus else (), grows)


def mixed(*nodes: dict[str, float]) -> ClusterResources:
    """A cluster with different nodes."""
    return ClusterResources(nodes)


def plan(here: ClusterResources, gpu: Gpu | None = None, **request: Any) -> WorkerPlan:
    gpu = gpu or (A_GPU if here.total("GPU") and request.get("use_gpu") is not False else None)
    given = {"workers": None, "use_gpu": None, "wait_seconds": 0} | request
    return plan_workers(WorkerRequest(**given), here, gpu)


@pytest.mark.parametrize(
    ("here", "workers", "per_worker"),
    [
        (cluster(2), 1, {"CPU": 0.75}),  # a laptop
        (cluster(1), 1, {"CPU": 0.75}),
        (cluster(16, 1), 1, {"CPU": 0.75, "GPU": 1}),  # one GPU box
        (cluster(64, 8, nodes=2), 8, {"CPU": 0.75, "GPU": 1}),  # a GPU cluster
        (cluster(32, nodes=4), 4, {"CPU": 0.75}),  # CPUs only: one worker per node
        (cluster(0, grows=True), 1, {"CPU": 0.75}),  # nodes come for it
        # CPUs are those of the nodes that have GPUs, and the node with the fewest of them for each GPU decides.
        (mixed({"CPU": 64}, {"CPU": 4, "GPU": 8}), 8, {"CPU": 0.375, "GPU": 1}),
        (mixed({"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 8}), 16, {"CPU": 0.375, "GPU": 1}),
        (mixed({"CPU": 16}, {"GPU": 2}), 2, {"CPU": 0, "GPU": 1}),  # GPU nodes that were started with --num-cpus=0
    ],
)
def test_defaults_of_training(here: ClusterResources, workers: int, per_worker: dict[str, float]) -> None:
    made = plan(here, group=True, useful_gpus=256)
    assert (made.worker_range, made.needed, made.per_worker) == ((workers, workers), workers, per_worker)
    assert here.can_grow or here.workers_that_fit(per_worker) >= workers


def test_no_gpu_gets_fewer_rows_than_it_can_use() -> None:
    assert plan(cluster(64, 8), group=True, useful_gpus=2).workers == 2
    assert plan(cluster(64, 8), group=True, useful_gpus=2, workers=(8, 8)).workers == 8, "asked for"


@pytest.mark.parametrize("here", [cluster(3), cluster(4, 8)])
def test_training_always_leaves_cpus_for_other_tasks(here: ClusterResources) -> None:
    cpus = here.total("CPU")
    for workers in range(1, int(here.total("GPU") or cpus) + 1):
        for low in (workers, 1):
            assert 0 < workers * plan(here, group=True, workers=(low, workers)).per_worker["CPU"] <= 0.75 * cpus + 1e-9


def test_a_cluster_of_others_may_lack_what_is_requested() -> None:
    made = plan(cluster(2, grows=True), group=True, workers=(2, 4), use_gpu=True)
    assert (made.worker_range, made.needed, made.per_worker) == ((2, 4), 2, {"CPU": 0.75, "GPU": 1})
    assert plan(cluster(0, grows=True), workers=(4, 4), use_gpu=True).per_worker["GPU"] == 1 / 4


@pytest.mark.parametrize(
    ("request_", "here", "gpu_gib", "workers", "per_worker"),
    [
        ({}, cluster(2), 0, 2, {"CPU": 1}),  # a laptop
        ({}, cluster(16, 1), 80, 8, {"CPU": 1, "GPU": 1 / 8}),  # one GPU box: eight processes share the card
        ({}, cluster(16, 1), 16, 4, {"CPU": 1, "GPU": 1 / 4}),  # its memory holds four
        ({}, cluster(2, 1), 80, 2, {"CPU": 1, "GPU": 1 / 2}),  # two cores feed it
        ({"workers": (1, 1)}, cluster(16, 1), 80, 1, {"CPU": 1, "GPU": 1}),
        ({"workers": (3, 3)}, cluster(16, 8), 80, 3, {"CPU": 1, "GPU": 1}),  # three of the cards
        ({"use_gpu": False}, cluster(16, 1), 0, 16, {"CPU": 1}),
        # What a cluster may grow to counts.
        ({"use_gpu": True}, cluster(0, grows=True), 0, 16 * 4, {"CPU": 1, "GPU": 1 / 4}),
        ({}, cluster(2, grows=True), 0, 128, {"CPU": 1}),
    ],
)
def test_scoring_uses_the_whole_cluster(
    request_: dict[str, Any], here: ClusterResources, gpu_gib: int, workers: int, per_worker: dict[str, float]
) -> None:
    gpu = Gpu(bf16=True, memory_bytes=gpu_gib * 2**30) if gpu_gib else None
    made = plan(here, gpu, **request_)
    assert (made.workers, made.needed, made.per_worker) == (workers, 1, per_worker)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"workers": (3, 3)}, r"--num-workers 3: only 2 of them, with .* each, fit on the nodes \(2 CPUs and 0 GPUs on 1 node\)"),
        ({"use_gpu": True}, r"--use-gpu true: the cluster has no GPU \(2 CPUs and 0 GPUs on 1 node\)"),
    ],
)
def test_more_than_a_cluster_of_this_job_has_is_refused(request_: dict[str, Any], said: str) -> None:
    for group in (True, False):
        with pytest.raises(RequestError, match=said):
            plan(cluster(2), group=group, **request_)


def test_a_share_that_is_too_large_for_a_gpu_is_refused() -> None:
    check_share(WorkerPlan((2, 2), 2, {"GPU": 1}), 65_536)
    check_share(WorkerPlan((1, 1), 1, {"CPU": 1}), 65_536)
    with pytest.raises(RequestError, match="--batch-size 65536: a GPU would compute 65,536 rows at once, and can 32,768"):
        check_share(WorkerPlan((1, 2), 1, {"GPU": 1}), 65_536)
