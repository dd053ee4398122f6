"""The resources that a job reserves on clusters of different sizes, and requests that no cluster can meet."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import ClusterResources
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.resources import plan_scoring_resources
from mnistsum_ray.training.resources import plan_resources

GPU_BYTES = 16 * 2**30


def cluster(
    cpus: float, gpus: float = 0, nodes: int = 1, *, can_grow: bool = False, limits: dict[str, float] | None = None
) -> ClusterResources:
    total = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    each = {kind: amount / nodes for kind, amount in total.items()}
    return ClusterResources((each,) * nodes, total, total, can_grow, limits or {})


def mixed(*nodes: dict[str, float]) -> ClusterResources:
    """A cluster with different nodes."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return ClusterResources(nodes, total, total, can_grow=False)


@pytest.mark.parametrize(
    ("here", "workers", "use_gpu"),
    [
        (cluster(2), 1, False),  # a laptop
        (cluster(1), 1, False),
        (cluster(16, 1), 1, True),  # one GPU box
        (cluster(64, 8, nodes=2), 8, True),  # a GPU cluster
        (cluster(32, nodes=4), 4, False),  # CPUs only: one worker per node
        (cluster(4, can_grow=True), 1, False),
    ],
)
def test_defaults(here: ClusterResources, workers: int, use_gpu: bool) -> None:
    resource_plan = plan_resources(TrainConfig(), here, 4096)
    assert (resource_plan.workers, resource_plan.use_gpu) == ((workers, workers), use_gpu)


@pytest.mark.parametrize(("batch_size", "workers"), [(64, 1), (256, 1), (600, 2), (2048, 8), (65_536, 8)])
def test_no_gpu_gets_fewer_rows_than_it_can_use(batch_size: int, workers: int) -> None:
    assert plan_resources(TrainConfig(), cluster(64, 8), batch_size).workers == (workers, workers)
    assert plan_resources(TrainConfig(num_workers=8), cluster(64, 8), batch_size).workers == (8, 8), "asked for"


@pytest.mark.parametrize("here", [cluster(1), cluster(2), cluster(3), cluster(8), cluster(4, 8), cluster(16, 1), cluster(1, 1)])
def test_workers_always_leave_cpus_for_other_tasks(here: ClusterResources) -> None:
    most = int(here.total.get("GPU", here.total["CPU"]))
    for workers in range(1, most + 1):
        need = plan_resources(TrainConfig(num_workers=workers), here, 256).bundles()
        assert 0 < sum(bundle["CPU"] for bundle in need) <= 0.75 * here.total["CPU"] + 1e-9


@pytest.mark.parametrize(
    ("config", "here", "said"),
    [
        (
            TrainConfig(num_workers=3),
            cluster(2),
            "--num-workers 3: needs 3 CPUs, one a worker; the cluster has 2 CPUs and 0 GPUs on 1 node",
        ),
        (TrainConfig(use_gpu=True), cluster(2), "--use-gpu true: the cluster has no GPU"),
        (TrainConfig(num_workers=(3, 5)), cluster(8, 2), "--num-workers 3: needs 3 GPUs, one a worker"),
    ],
)
def test_more_workers_than_the_cluster_can_have_are_refused(config: TrainConfig, here: ClusterResources, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        plan_resources(config, here, 256)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("here", "cpus"),
    [
        (mixed({"CPU": 64}, {"CPU": 4, "GPU": 8}), 0.375),  # a CPU head, and a node with eight GPUs
        (mixed({"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 8}), 0.375),  # the node with the fewest CPUs per GPU decides
        (mixed({"CPU": 2}, {"CPU": 32, "GPU": 4}), 1.0),
        (mixed({"CPU": 16}, {"GPU": 2}), 0.0),  # GPU nodes that were started with --num-cpus=0
    ],
)
def test_gpu_workers_take_cpus_of_the_nodes_that_have_gpus(here: ClusterResources, cpus: float) -> None:
    resource_plan = plan_resources(TrainConfig(), here, 4096)
    assert resource_plan.workers == (here.total["GPU"],) * 2
    assert resource_plan.cpus_per_worker == pytest.approx(cpus)
    assert here.workers_that_fit(resource_plan.per_worker) == here.total["GPU"]


def test_two_gpu_workers_reserve_one_cpu_each() -> None:
    here = mixed({"CPU": 64}, {"CPU": 4, "GPU": 8})
    assert plan_resources(TrainConfig(num_workers=2), here, 256).cpus_per_worker == 1.0


def test_workers_that_fit_on_no_node_are_refused() -> None:
    here = mixed(*[{"CPU": 0.5}] * 4, {"CPU": 1})
    with pytest.raises(RequestError, match=r"--num-workers 3: only 1 of them, with 0.75 CPUs each, fit on the nodes"):
        plan_resources(TrainConfig(num_workers=3), here, 256)


def test_gpus_that_cannot_be_used_are_skipped() -> None:
    resource_plan = plan_resources(TrainConfig(), cluster(8, 1).without_gpus(), 256)
    assert (resource_plan.workers, resource_plan.use_gpu, resource_plan.per_worker) == ((1, 1), False, {"CPU": 1.0})


def test_an_elastic_run_leaves_cpus_for_other_tasks_at_its_largest() -> None:
    resource_plan = plan_resources(TrainConfig(num_workers=(1, 4)), cluster(4), 256)
    assert 4 * resource_plan.cpus_per_worker <= 3


def test_an_elastic_run_may_ask_for_more_workers_than_fit_now() -> None:
    assert plan_resources(TrainConfig(num_workers=(1, 9)), cluster(16, 4), 256).workers == (1, 9)


def test_the_present_gpu_nodes_decide_the_cpus_per_worker_also_on_a_growing_cluster() -> None:
    nodes = ({"CPU": 64.0}, {"CPU": 4.0, "GPU": 8.0})
    here = ClusterResources(nodes, {"CPU": 68.0, "GPU": 8.0}, {"CPU": 68.0, "GPU": 8.0}, can_grow=True)
    resource_plan = plan_resources(TrainConfig(), here, 4096)
    assert resource_plan.workers == (8, 8)
    assert here.workers_that_fit(resource_plan.per_worker) == 8


def test_a_growing_cluster_may_lack_the_requested_resources() -> None:
    resource_plan = plan_resources(TrainConfig(num_workers=(2, 4), use_gpu=True), cluster(2, can_grow=True), 256)
    assert (resource_plan.workers, resource_plan.use_gpu) == ((2, 4), True)
    assert resource_plan.bundles() == [{"CPU": 1, "GPU": 1}] * 2
    config = ScoreConfig(model="m", input=("i",), output="o", num_workers=4, use_gpu=True)
    assert plan_scoring_resources(config, cluster(0, can_grow=True), GPU_BYTES).workers == 4


@pytest.mark.parametrize(
    ("here", "use_gpu", "workers"),
    [
        (cluster(0, can_grow=True, limits={"GPU": 4, "CPU": 18}), True, 4 * 4),  # scaled to zero
        (cluster(2, 1, can_grow=True, limits={"GPU": 4, "CPU": 18}), None, 4 * 2),  # one GPU has come, with two CPUs
        (cluster(2, can_grow=True), True, 16 * 4),  # an autoscaler without limits
        (cluster(2, can_grow=True, limits={"CPU": 32}), None, 32),
        (cluster(2, can_grow=True), None, 128),
        (cluster(2, can_grow=True, limits={"CPU": 32, "GPU": 4}), False, 32),  # requested
        (cluster(2, can_grow=True, limits={"CPU": 32, "GPU": 4}), None, 2),  # no GPU nodes are started just for their CPUs
    ],
)
def test_scoring_is_sized_for_what_the_cluster_can_grow_to(here: ClusterResources, use_gpu: bool | None, workers: int) -> None:
    taken = plan_scoring_resources(ScoreConfig(model="m", input=("i",), output="o", use_gpu=use_gpu), here, GPU_BYTES)
    assert taken.workers == workers
    assert max(taken.per_worker.values()) <= 1, "a worker fits on a small node"


@pytest.mark.parametrize(
    ("config", "here", "gpu_bytes", "workers", "per_worker"),
    [
        ({}, cluster(2), 0, 2, {"CPU": 1.0}),  # a laptop
        ({"num_workers": 4}, cluster(4), 0, 4, {"CPU": 1.0}),
        ({}, cluster(16, 1), 80 * 2**30, 8, {"CPU": 1.0, "GPU": 1 / 8}),  # one GPU box: eight processes share the card
        ({}, cluster(16, 1), 16 * 2**30, 4, {"CPU": 1.0, "GPU": 1 / 4}),  # its memory holds four
        ({}, cluster(2, 1), 80 * 2**30, 2, {"CPU": 1.0, "GPU": 1 / 2}),  # two cores feed it
        ({"num_workers": 1}, cluster(16, 1), 80 * 2**30, 1, {"CPU": 1.0, "GPU": 1.0}),
        ({"num_workers": 3}, cluster(16, 8), 80 * 2**30, 3, {"CPU": 1.0, "GPU": 1.0}),  # three of the cards
        ({"use_gpu": False, "num_workers": 3}, cluster(16, 1), 0, 3, {"CPU": 1.0}),
        ({"precision": "int8"}, cluster(16, 1), 0, 16, {"CPU": 1.0}),
    ],
)
def test_scoring_uses_the_whole_cluster(
    config: dict[str, Any], here: ClusterResources, gpu_bytes: int, workers: int, per_worker: dict[str, float]
) -> None:
    taken = plan_scoring_resources(ScoreConfig(model="m", input=("i",), output="o", **config), here, gpu_bytes)
    assert (taken.workers, taken.per_worker) == (workers, per_worker)
    assert here.workers_that_fit(taken.per_worker) >= workers


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_workers": 3}, "--num-workers 3: needs 3 CPUs, one a worker; the cluster has 2 CPUs"),
        ({"use_gpu": True}, "--use-gpu true: the cluster has no GPU"),
    ],
)
def test_more_scoring_workers_than_the_cluster_can_have_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan_scoring_resources(ScoreConfig(model="m", input="i", output="o", **config), cluster(2), GPU_BYTES)
