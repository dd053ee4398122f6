"""The workers that a job reserves on different clusters, and requests that none can meet."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import ClusterResources, Gpu, WorkerPlan, plan_workers
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError


def cluster(cpus: float, gpus: float = 0, nodes: int = 1, grows: bool = False) -> ClusterResources:
    node = {"CPU": cpus / nodes} | ({"GPU": gpus / nodes} if gpus else {})
    return ClusterResources((node,) * nodes if cpus or gpus else (), grows)


def plan(kind: str, here: ClusterResources, gpu_gib: int = 16, **given: Any) -> WorkerPlan:
    config: TrainConfig | ScoreConfig = TrainConfig(**given)
    if kind == "score":
        config = ScoreConfig(model="m", input=("i",), output="o", **given)
    has_gpu = here.total("GPU") and config.use_gpu is not False
    gpu = Gpu(bf16=True, memory_bytes=gpu_gib * 2**30) if has_gpu else None
    return plan_workers(config, here, gpu, useful_gpus=8)


TRAINING: list[Any] = [
    (cluster(2), {}, (1, 1), {"CPU": 0.75}),  # a laptop
    (cluster(16, 1), {}, (1, 1), {"GPU": 1}),  # one GPU box
    (cluster(64, 8, nodes=2), {}, (8, 8), {"GPU": 1}),  # a GPU cluster
    (cluster(64, 16), {}, (8, 8), {"GPU": 1}),  # with more than enough of them
    (cluster(64, 16), {"num_workers": 16}, (16, 16), {"GPU": 1}),
    (cluster(32, nodes=4), {}, (4, 4), {"CPU": 0.75}),  # CPUs only: one worker per node
    (cluster(0, grows=True), {}, (1, 1), {"CPU": 0.75}),  # nodes come for it
    (cluster(2, grows=True), {"num_workers": (2, 4), "use_gpu": True}, (2, 4), {"GPU": 1}),
]


@pytest.mark.parametrize(("here", "given", "workers", "per_worker"), TRAINING)
def test_training(here: ClusterResources, given: Any, workers: Any, per_worker: Any) -> None:
    made = plan("train", here, **given)
    assert (made.worker_range, made.per_worker) == (workers, per_worker)
    assert here.can_grow or here.workers_that_fit(per_worker) >= workers[0]


SCORING: list[Any] = [
    (cluster(2), 0, {}, 2, {"CPU": 1}),  # a laptop
    (cluster(16, 1), 80, {}, 8, {"GPU": 1 / 8}),  # one GPU box: eight processes share the card
    (cluster(16, 1), 16, {}, 4, {"GPU": 1 / 4}),  # its memory holds four
    (cluster(2, 1), 80, {}, 2, {"GPU": 1 / 2}),  # two cores feed it
    (cluster(16, 1), 80, {"num_workers": 1}, 1, {"GPU": 1}),
    (cluster(16, 8), 80, {"num_workers": 3}, 3, {"GPU": 1}),  # three of the cards
    (cluster(16, 1), 0, {"use_gpu": False}, 16, {"CPU": 1}),
    # What a cluster may grow to counts.
    (cluster(0, grows=True), 0, {"use_gpu": True}, 16, {"GPU": 1}),
    (cluster(2, grows=True), 0, {}, 128, {"CPU": 1}),
]


@pytest.mark.parametrize(("here", "gib", "given", "workers", "per_worker"), SCORING)
def test_scoring(here: Any, gib: int, given: Any, workers: int, per_worker: Any) -> None:
    """It uses the whole cluster."""
    made = plan("score", here, gib, **given)
    assert (made.worker_range, made.per_worker) == ((1, workers), per_worker)


@pytest.mark.parametrize("kind", ["train", "score"])
def test_more_than_a_cluster_of_this_job_has_is_refused(kind: str) -> None:
    where = r"\(2 CPUs and 0 GPUs on 1 node\)"
    said = f"--num-workers 3: only 2 of them, with .* each, fit on the nodes {where}"
    with pytest.raises(RequestError, match=said):
        plan(kind, cluster(2), num_workers=3)
    with pytest.raises(RequestError, match=f"--use-gpu true: the cluster has no GPU {where}"):
        plan(kind, cluster(2), use_gpu=True)
