"""What a run takes of a cluster of a given size; what can never run is refused."""

from typing import Any

import pytest

from mnistsum_ray.cluster.resources import Cluster
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.resources import plan_scoring_resources
from mnistsum_ray.training.resources import plan_resources


def cluster(
    cpus: float, gpus: float = 0, nodes: int = 1, *, can_grow: bool = False, limits: dict[str, float] | None = None
) -> Cluster:
    total = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    each = {kind: amount / nodes for kind, amount in total.items()}
    return Cluster((each,) * nodes, total, total, can_grow, limits or {})


def mixed(*nodes: dict[str, float]) -> Cluster:
    """Of unlike nodes."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return Cluster(nodes, total, total, can_grow=False)


@pytest.mark.parametrize(
    ("here", "workers", "use_gpu"),
    [
        (cluster(2), 1, False),  # a laptop
        (cluster(1), 1, False),
        (cluster(16, 1), 1, True),  # one GPU box
        (cluster(64, 8, nodes=2), 8, True),  # a GPU cluster
        (cluster(32, nodes=4), 4, False),  # CPUs only: a worker a node
        (cluster(4, can_grow=True), 1, False),
    ],
)
def test_defaults(here: Cluster, workers: int, use_gpu: bool) -> None:
    resource_plan = plan_resources(TrainConfig(), here)
    assert (resource_plan.workers, resource_plan.use_gpu) == ((workers, workers), use_gpu)


@pytest.mark.parametrize("here", [cluster(1), cluster(2), cluster(3), cluster(8), cluster(4, 8), cluster(16, 1), cluster(1, 1)])
def test_workers_always_leave_cpus_for_other_tasks(here: Cluster) -> None:
    most = int(here.total.get("GPU", here.total["CPU"]))
    for workers in range(1, most + 1):
        need = plan_resources(TrainConfig(num_workers=workers), here).bundles()
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
def test_more_than_there_can_be_is_refused(config: TrainConfig, here: Cluster, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        plan_resources(config, here)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("here", "cpus"),
    [
        (mixed({"CPU": 64}, {"CPU": 4, "GPU": 8}), 0.375),  # a CPU head, and one box of eight GPUs
        (mixed({"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 8}), 0.375),  # the scarcest decides
        (mixed({"CPU": 2}, {"CPU": 32, "GPU": 4}), 1.0),
        (mixed({"CPU": 16}, {"GPU": 2}), 0.0),  # GPU nodes that were started with --num-cpus=0
    ],
)
def test_gpu_workers_take_cpus_of_the_nodes_that_have_gpus(here: Cluster, cpus: float) -> None:
    resource_plan = plan_resources(TrainConfig(), here)
    assert resource_plan.workers == (here.total["GPU"],) * 2
    assert resource_plan.cpus_per_worker == pytest.approx(cpus)
    assert here.places(resource_plan.per_worker) == here.total["GPU"]


def test_a_few_gpu_workers_take_no_more_cpus_than_they_can_have() -> None:
    here = mixed({"CPU": 64}, {"CPU": 4, "GPU": 8})
    assert plan_resources(TrainConfig(num_workers=2), here).cpus_per_worker == 1.0


def test_workers_that_fit_on_no_node_are_refused() -> None:
    here = mixed(*[{"CPU": 0.5}] * 4, {"CPU": 1})
    with pytest.raises(RequestError, match=r"--num-workers 3: only 1 of them, with 0.75 CPUs each, fit on the nodes"):
        plan_resources(TrainConfig(num_workers=3), here)


def test_gpus_that_cannot_be_used_are_skipped() -> None:
    resource_plan = plan_resources(TrainConfig(), cluster(8, 1).without_gpus())
    assert (resource_plan.workers, resource_plan.use_gpu, resource_plan.per_worker) == ((1, 1), False, {"CPU": 1.0})


def test_an_elastic_run_leaves_cpus_for_other_tasks_at_its_largest() -> None:
    resource_plan = plan_resources(TrainConfig(num_workers=(1, 4)), cluster(4))
    assert 4 * resource_plan.cpus_per_worker <= 3


def test_an_elastic_run_may_hope_for_more_than_there_is() -> None:
    assert plan_resources(TrainConfig(num_workers=(1, 9)), cluster(16, 4)).workers == (1, 9)


def test_gpu_nodes_that_are_there_tell_how_many_cpus_each_worker_has_also_where_more_may_come() -> None:
    nodes = ({"CPU": 64.0}, {"CPU": 4.0, "GPU": 8.0})
    here = Cluster(nodes, {"CPU": 68.0, "GPU": 8.0}, {"CPU": 68.0, "GPU": 8.0}, can_grow=True)
    resource_plan = plan_resources(TrainConfig(), here)
    assert resource_plan.workers == (8, 8)
    assert here.places(resource_plan.per_worker) == 8


def test_what_a_growing_cluster_has_not_got_is_waited_for() -> None:
    resource_plan = plan_resources(TrainConfig(num_workers=(2, 4), use_gpu=True), cluster(2, can_grow=True))
    assert (resource_plan.workers, resource_plan.use_gpu) == ((2, 4), True)
    assert resource_plan.bundles() == [{"CPU": 1, "GPU": 1}] * 2
    config = ScoreConfig(model="m", input=("i",), output="o", num_workers=4, use_gpu=True)
    assert plan_scoring_resources(config, cluster(0, can_grow=True)).actors == 4


@pytest.mark.parametrize(
    ("here", "use_gpu", "actors", "readers"),
    [
        (cluster(0, can_grow=True, limits={"GPU": 4, "CPU": 18}), True, 4, 17),  # scaled to zero
        (cluster(2, 1, can_grow=True, limits={"GPU": 4, "CPU": 18}), None, 4, 17),  # one GPU has come
        (cluster(2, can_grow=True), True, 16, 127),  # an autoscaler that does not say how far
        (cluster(2, can_grow=True, limits={"CPU": 32}), None, 32, 0),
        (cluster(2, can_grow=True), None, 128, 0),
        (cluster(2, can_grow=True, limits={"CPU": 32, "GPU": 4}), False, 32, 0),  # asked for
        (cluster(2, can_grow=True, limits={"CPU": 32, "GPU": 4}), None, 2, 0),  # no GPU nodes for the sake of their CPUs
    ],
)
def test_scoring_is_sized_for_what_the_cluster_can_grow_to(
    here: Cluster, use_gpu: bool | None, actors: int, readers: int
) -> None:
    taken = plan_scoring_resources(ScoreConfig(model="m", input=("i",), output="o", use_gpu=use_gpu), here)
    assert (taken.actors, taken.readers) == (actors, readers)
    assert max(amount for bundle in taken.bundles() for amount in bundle.values()) <= 1, "each fits on a small node"


@pytest.mark.parametrize(
    ("config", "here", "actors", "readers"),
    [
        ({}, cluster(2), 2, 0),  # a laptop: an actor a CPU, each reads by itself
        ({}, cluster(16, 1), 1, 15),  # one GPU box: the CPUs read for the GPU
        ({"use_gpu": False, "num_workers": 3, "num_readers": 2}, cluster(16, 1), 3, 2),
        ({"num_readers": 1}, cluster(1), 1, 1),
    ],
)
def test_scoring_takes_what_there_is_and_leaves_room_to_read(
    config: dict[str, Any], here: Cluster, actors: int, readers: int
) -> None:
    taken = plan_scoring_resources(ScoreConfig(model="m", input="i", output="o", **config), here)
    assert (taken.actors, taken.readers) == (actors, readers)
    tasks = readers + 1 if readers else 0
    assert actors * taken.cpus_per_actor + tasks * taken.cpus_per_task <= here.total["CPU"] + 1e-9
    assert taken.cpus_per_task > 0 or not readers
    assert here.places(taken.per_actor) >= actors


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_workers": 3}, "--num-workers 3: needs 3 CPUs, one a worker; the cluster has 2 CPUs"),
        ({"use_gpu": True}, "--use-gpu true: the cluster has no GPU"),
    ],
)
def test_scoring_with_more_than_there_can_be_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan_scoring_resources(ScoreConfig(model="m", input="i", output="o", **config), cluster(2))
