"""The workers that a job reserves on clusters of different sizes, and requests that no cluster can meet."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnistsum_ray.cluster import gpus, resources
from mnistsum_ray.cluster.gpus import Gpu
from mnistsum_ray.cluster.nodes import HEAD, Autoscaler
from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan, WorkerRequest, plan_workers
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring import driver as scoring
from mnistsum_ray.training import resources as training


def cluster(cpus: float, gpus: float = 0, nodes: int = 1, **growth: Any) -> ClusterResources:
    return mixed(*[{"CPU": cpus / nodes} | ({"GPU": gpus / nodes} if gpus else {})] * nodes, **growth)


def by(**most: int) -> Autoscaler:
    """An autoscaler that may add so many nodes, with 8 CPUs each, and with 4 and a GPU."""
    kinds = {"cpus": {"CPU": 8.0}, "gpus": {"CPU": 4.0, "GPU": 1.0}}
    return Autoscaler("v2", tuple((kinds[kind], count) for kind, count in most.items()))


def mixed(*nodes: dict[str, float], grows: Autoscaler | None = None) -> ClusterResources:
    """A cluster with different nodes."""
    return ClusterResources(nodes, (), grows)


def train(here: ClusterResources, batch_size: int = 4096, **config: Any) -> WorkerPlan:
    return plan_workers(training.worker_request(TrainConfig(**config), batch_size), here)


def score(here: ClusterResources, gpu_bytes: int = 16 * 2**30, **config: Any) -> WorkerPlan:
    request = scoring.worker_request(ScoreConfig(model="m", input=("i",), output="o", **config))
    return plan_workers(request, here, Gpu(bf16=True, memory_bytes=gpu_bytes))


@pytest.mark.parametrize(
    ("here", "workers", "per_worker"),
    [
        (cluster(2), 1, {"CPU": 1}),  # a laptop
        (cluster(1), 1, {"CPU": 0.75}),
        (cluster(16, 1), 1, {"CPU": 1, "GPU": 1}),  # one GPU box
        (cluster(64, 8, nodes=2), 8, {"CPU": 1, "GPU": 1}),  # a GPU cluster
        (cluster(32, nodes=4), 4, {"CPU": 1}),  # CPUs only: one worker per node
        (cluster(4, grows=by()), 1, {"CPU": 1}),
        # CPUs are those of the nodes that have GPUs, and the node with the fewest of them for each GPU decides.
        (mixed({"CPU": 64}, {"CPU": 4, "GPU": 8}), 8, {"CPU": 0.375, "GPU": 1}),
        (mixed({"CPU": 64, "GPU": 8}, {"CPU": 4, "GPU": 8}), 16, {"CPU": 0.375, "GPU": 1}),
        (mixed({"CPU": 16}, {"GPU": 2}), 2, {"CPU": 0, "GPU": 1}),  # GPU nodes that were started with --num-cpus=0
    ],
)
def test_defaults_of_training(here: ClusterResources, workers: int, per_worker: dict[str, float]) -> None:
    plan = train(here, batch_size=65_536)
    assert (plan.worker_range, plan.needed, plan.per_worker) == ((workers, workers), workers, per_worker)
    assert here.workers_that_fit(per_worker) >= workers


@pytest.mark.parametrize(("batch_size", "workers"), [(256, 1), (600, 2), (65_536, 8)])
def test_no_gpu_gets_fewer_rows_than_it_can_use(batch_size: int, workers: int) -> None:
    assert train(cluster(64, 8), batch_size).workers == workers
    assert train(cluster(64, 8), batch_size, num_workers=8).workers == 8, "asked for"


@pytest.mark.parametrize("here", [cluster(3), cluster(4, 8)])
def test_training_always_leaves_cpus_for_other_tasks(here: ClusterResources) -> None:
    cpus = here.total("CPU")
    for workers in range(1, int(here.total("GPU") or cpus) + 1):
        for elastic in (workers, (1, workers)):
            assert 0 < workers * train(here, num_workers=elastic).per_worker["CPU"] <= 0.75 * cpus + 1e-9


def test_a_growing_cluster_may_lack_what_is_requested() -> None:
    plan = train(cluster(2, grows=by()), num_workers=(2, 4), use_gpu=True)
    assert (plan.worker_range, plan.needed, plan.per_worker) == ((2, 4), 2, {"CPU": 1, "GPU": 1})
    assert train(cluster(16, 4), num_workers=(1, 9)).worker_range == (1, 9), "more may join"
    assert score(cluster(0, grows=by()), num_workers=4, use_gpu=True).workers == 4


@pytest.mark.parametrize(
    ("config", "here", "gpu_gib", "workers", "per_worker"),
    [
        ({}, cluster(2), 0, 2, {"CPU": 1}),  # a laptop
        ({}, cluster(16, 1), 80, 8, {"CPU": 1, "GPU": 1 / 8}),  # one GPU box: eight processes share the card
        ({}, cluster(16, 1), 16, 4, {"CPU": 1, "GPU": 1 / 4}),  # its memory holds four
        ({}, cluster(2, 1), 80, 2, {"CPU": 1, "GPU": 1 / 2}),  # two cores feed it
        ({"num_workers": 1}, cluster(16, 1), 80, 1, {"CPU": 1, "GPU": 1}),
        ({"num_workers": 3}, cluster(16, 8), 80, 3, {"CPU": 1, "GPU": 1}),  # three of the cards
        # What a cluster can grow to counts, and each worker fits on a small node.
        ({"use_gpu": True}, cluster(0, grows=by(gpus=4)), 16, 4 * 4, {"CPU": 1, "GPU": 1 / 4}),  # from zero
        ({}, cluster(2, 1, grows=by(gpus=4)), 16, 4 * 2, {"CPU": 1, "GPU": 1 / 2}),  # one has come
        ({"use_gpu": True}, cluster(2, grows=by()), 16, 16 * 4, {"CPU": 1, "GPU": 1 / 4}),  # without limits
        ({}, mixed({"CPU": 2, HEAD: 1}, {"CPU": 8}, grows=by(cpus=4)), 0, 2 + 32, {"CPU": 1}),
        ({"use_gpu": False}, cluster(2, grows=by()), 0, 128, {"CPU": 1}),
        # No GPU nodes are started just for their CPUs.
        ({}, cluster(2, grows=by(gpus=4)), 0, 2, {"CPU": 1}),
        ({}, cluster(2, grows=by()), 0, 2, {"CPU": 1}),
    ],
)
def test_scoring_uses_the_whole_cluster(
    config: dict[str, Any], here: ClusterResources, gpu_gib: int, workers: int, per_worker: dict[str, float]
) -> None:
    plan = score(here, gpu_gib * 2**30, **config)
    assert (plan.workers, plan.needed, plan.per_worker) == (workers, 1, per_worker)


@pytest.mark.parametrize("plan", [train, score])
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_workers": 3}, "--num-workers 3: needs 3 CPUs, one a worker; the cluster has 2 CPUs and 0 GPUs on 1 node"),
        ({"use_gpu": True}, "--use-gpu true: the cluster has no GPU (2 CPUs and 0 GPUs on 1 node)"),
    ],
)
def test_more_than_the_cluster_can_have_is_refused(plan: Any, config: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        plan(cluster(2), **config)
    assert said in str(refused.value)


@pytest.mark.parametrize("plan", [train, score])
def test_from_zero_a_request_says_whether_nodes_with_gpus_may_be_started(plan: Any) -> None:
    for here, growth in (
        (cluster(0, grows=by(gpus=2)), ", and may grow to 8 CPUs and 2 GPUs, as its autoscaler (v2) is configured"),
        (cluster(0, grows=by()), ", and may grow"),
    ):
        with pytest.raises(RequestError) as refused:
            plan(here)
        assert str(refused.value).endswith(f"{growth}; --use-gpu true takes nodes with GPUs, and --use-gpu false the CPUs of any")
    with pytest.raises(RequestError, match="--use-gpu true: the cluster has no GPU"):
        plan(cluster(0, grows=by(cpus=4)), use_gpu=True)


def test_training_workers_that_do_not_all_fit_are_refused() -> None:
    uneven = mixed(*[{"CPU": 0.5}] * 4, {"CPU": 1})
    with pytest.raises(RequestError, match=r"--num-workers 3: only 1 of them, with 0.75 CPUs each, fit on the nodes"):
        train(uneven, num_workers=3)
    assert score(uneven).workers == 3, "scoring starts with those that fit"


NO_KERNELS = "PyTorch 2.13.0 on Tesla V100 (compute capability 7.0) cannot use it: no kernel image"
GPU = Gpu(bf16=True, memory_bytes=80 * 2**30)


def reserve_here(monkeypatch: pytest.MonkeyPatch, *found: Gpu | str, **request: Any) -> tuple[WorkerPlan, list[str]]:
    """Reserve on nodes of 16 CPUs and a GPU each, which answer this; the plan and the lines on the console."""
    nodes = [{"NodeID": f"id{index}", "NodeManagerAddress": f"10.0.0.{index}"} for index in range(max(1, len(found)))]
    answers = list(zip(nodes, found, strict=False))

    def inspect(without: Sequence[str] = ()) -> ClusterResources:
        here = [{"CPU": 16.0, "GPU": 1.0} for node in nodes if node["NodeID"] not in without]
        return ClusterResources(tuple(here), tuple(here))

    said = list[str]()
    monkeypatch.setattr(resources, "inspect_cluster", inspect)
    monkeypatch.setattr(resources, "ask_nodes", dict)
    monkeypatch.setattr(resources, "answers_of", lambda *_: answers)
    settings: dict[str, Any] = {"workers": None, "use_gpu": None, "wait_seconds": 0} | request
    return resources.reserve(WorkerRequest(**settings), said.append), said


@pytest.mark.parametrize(
    ("found", "problem", "advice"),
    [
        ([NO_KERNELS], f"Ray counts 1 GPU, but {NO_KERNELS}", "PyTorch needs a CUDA build that fits card and driver"),
        ([NO_KERNELS, "no CUDA"], f"Ray counts 2 GPUs, but on node 10.0.0.0 {NO_KERNELS}", "PyTorch needs a CUDA build"),
        ([], "no GPU has answered for 60 s: other jobs hold them, or PyTorch takes longer to be imported there", "wait"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, found: list[str], problem: str, advice: str
) -> None:
    plan, said = reserve_here(monkeypatch, *found)
    assert (plan.describe(), said) == (f"{16 * max(1, len(found))} CPU workers", [f"running on CPUs: {problem}"])
    assert plan.label_selector is None, "their CPUs are as good as others"
    with pytest.raises(RequestError) as refused:
        reserve_here(monkeypatch, *found, use_gpu=True)
    assert str(refused.value).startswith(f"--use-gpu true: {problem}; {advice}")
    assert str(refused.value).endswith(", or leave --use-gpu out")


def test_a_node_whose_gpu_cannot_be_used_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Gpu(bf16=False, memory_bytes=16 * 2**30)
    plan, said = reserve_here(monkeypatch, GPU, NO_KERNELS, weak, group=True, useful_gpus=8)
    assert said == [f"the GPUs of node 10.0.0.1 are not used: {NO_KERNELS}"]
    assert (plan.workers, plan.label_selector, plan.gpu) == (2, {"ray.io/node-id": "!in(id1)"}, weak)
    elastic, _ = reserve_here(monkeypatch, GPU, NO_KERNELS, weak, group=True, workers=(1, 3))
    assert elastic.worker_range == (1, 2), "Ray Train would wait for a third"
    with pytest.raises(RequestError, match="--num-workers 3: needs 3 GPUs"):
        reserve_here(monkeypatch, GPU, NO_KERNELS, weak, group=True, workers=(3, 3))


def test_instances_of_a_card_are_not_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    mig = replace(GPU, mig=True)
    assert reserve_here(monkeypatch, mig, mig, group=True, useful_gpus=8)[0].workers == 1
    assert reserve_here(monkeypatch, mig, mig)[0].workers == 16, "scoring"
    with pytest.raises(RequestError, match=r"--num-workers 2: the GPUs are instances of cards with MIG on.*--num-workers 1"):
        reserve_here(monkeypatch, mig, mig, group=True, workers=(1, 2))


def test_a_share_that_is_too_large_for_a_gpu_is_refused() -> None:
    training.check_share(train(cluster(16, 2), 65_536, num_workers=2), 65_536)
    training.check_share(train(cluster(2), 65_536), 65_536)
    with pytest.raises(RequestError, match="--batch-size 65536: a GPU would compute 65,536 rows at once, and can 32,768"):
        training.check_share(train(cluster(16, 2), 65_536, num_workers=(1, 2)), 65_536)


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with …")


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA here")
def test_the_probe_says_why_a_card_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    build, zeros = f"PyTorch {torch.__version__}", torch.zeros
    assert str(gpus._ask_torch()).startswith(build)
    card = SimpleNamespace(name="Tesla V100", major=7, minor=0, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a2b")
    assert gpus._ask_torch() == Gpu(bf16=False, memory_bytes=16 * 2**30, mig=True)
    monkeypatch.setattr(torch, "ones", fail)
    assert gpus._ask_torch() == (
        f"{build} on Tesla V100 (compute capability 7.0) cannot use it: CUDA error: all CUDA-capable devices are busy or "
        "unavailable; does the card admit one process alone? Then give --num-workers 1"
    )
