"""The workers that a training asks for on different clusters, and requests that none can meet."""

from typing import Any

import pytest
import ray
import torch

from mnistsum_ray.cluster import resources
from mnistsum_ray.cluster.resources import WorkerPlan, plan_training
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import RequestError


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans for a cluster whose nodes have these resources."""

    def made(
        nodes: Any,
        say: Any = print,
        joined: bool = True,
        batch_size: int = 256,
        is_kept: bool = True,
        free: tuple[int, ...] = (),
        stored: int | None = None,
        **given: Any,
    ) -> WorkerPlan:
        alive = [{"Alive": True, "Resources": of} for of in nodes]
        monkeypatch.setattr(ray, "nodes", lambda: alive)
        monkeypatch.setattr(resources, "started_cluster", lambda: not joined)
        monkeypatch.setattr(resources, "free_cpus", lambda: list(free))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return plan_training(TrainConfig(**given), batch_size, say, stored, is_kept=is_kept)

    return made


def cpus(count: float, nodes: int = 1) -> list[dict[str, float]]:
    return [{"CPU": count}] * nodes


def gpus(count: float, nodes: int = 1) -> list[dict[str, float]]:
    return [{"CPU": 16, "GPU": count}] * nodes


CLUSTERS: list[Any] = [
    # Nodes, what is given, workers, what each reserves, threads.
    (cpus(2), {"joined": False}, (1, 1), {"CPU": 2}, 2),  # a laptop
    (cpus(16), {"num_workers": 3}, (3, 3), {"CPU": 5}, 5),
    (cpus(8, nodes=64), {}, (1, 1), {"CPU": 8}, 8),  # and not 64 workers of four rows
    (cpus(8, nodes=3), {"num_workers": 6}, (6, 6), {"CPU": 3}, 3),  # one CPU a node stays free
    ([], {}, (1, 1), {"CPU": 1}, 1),  # nodes come for it
    # Rows are read in each epoch, by tasks that need a CPU.
    (cpus(16), {"is_kept": False}, (1, 1), {"CPU": 15}, 15),
    (cpus(16), {"is_kept": False, "num_workers": 3}, (3, 3), {"CPU": 5}, 5),
    (cpus(8, nodes=2), {"is_kept": False, "num_workers": 2}, (2, 2), {"CPU": 7}, 7),
    (gpus(1), {}, (1, 1), {"GPU": 1}, None),  # one GPU box
    (gpus(1), {"use_gpu": False}, (1, 1), {"CPU": 16}, 16),
    (gpus(4, nodes=2), {"batch_size": 2048}, (8, 8), {"GPU": 1}, None),
    (cpus(2), {"num_workers": (2, 4), "use_gpu": True}, (2, 4), {"GPU": 1}, None),
]


@pytest.mark.parametrize(("nodes", "given", "workers", "per_worker", "threads"), CLUSTERS)
def test_a_worker_reserves_the_cpus_that_it_computes_with_or_a_gpu(
    plan: Any, nodes: Any, given: Any, workers: Any, per_worker: Any, threads: int | None
) -> None:
    made = plan(nodes, **given)
    found = ((made.least, made.most), made.per_worker, made.threads, made.use_gpu)
    assert found == (workers, per_worker, threads, "GPU" in per_worker)


def test_gpus_that_a_batch_is_too_small_for_stay_unused_and_a_line_says_so(plan: Any) -> None:
    said: list[str] = []
    assert plan(gpus(4, nodes=2), said.append, batch_size=767).most == 2
    small = "a batch of 767 rows is too small for more; raise --batch-size"
    assert said == [f"using 2 of 8 GPUs: {small}"]
    assert plan(gpus(2), batch_size=64).most == 1


def test_a_training_begins_with_the_cpus_that_are_free_and_goes_on_with_its_own(plan: Any) -> None:
    """Else it would wait for what its own trial of Ray Tune holds."""
    said: list[str] = []
    for threads, given in (
        (3, {"free": (3,)}),
        (2, {"free": (3,), "is_kept": False}),  # another one reads
        (3, {"free": (1,), "is_kept": False}),  # which waits: one CPU cannot both read and train
        (4, {"free": (3,), "threads": 4}),
        (4, {"free": (3,), "joined": False}),
        (3, {"free": (4,), "stored": 3}),
        (4, {"free": (3,), "stored": 8}),
    ):
        assert plan(cpus(4), said.append, **given).threads == threads, given
    free = "3 of 4 CPUs are free"
    assert said[0] == f"{free}: 3 threads; --threads 4 waits for more"
    assert said[1:] == [f"{free}: 2 threads; --threads 3 waits for more"]


def test_more_than_a_cluster_of_this_job_has_is_refused(plan: Any) -> None:
    for given, said in (
        ({"num_workers": 3}, r"the cluster .* has room for 2 workers with 1 CPU each; lower"),
        ({"num_workers": 65, "batch_size": 64}, "more than the rows of a batch"),
    ):
        with pytest.raises(RequestError, match=rf"^--num-workers \d+: {said}"):
            plan(cpus(2), joined=False, **given)
    said = "^--cache auto: .* 2 CPU workers of 1 thread leave no CPU for that; give fewer"
    with pytest.raises(RequestError, match=said):
        plan(cpus(2), joined=False, is_kept=False, num_workers=2)
