"""The workers that score on different clusters, the precision, and how a run ends."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from mnistsum_ray.cluster.resources import ClusterResources, WorkerPlan
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.scoring import job
from mnistsum_ray.scoring.job import choose_precision, explain_end, plan_workers
from mnistsum_ray.scoring.parts import Part, Run
from tests.scoring.conftest import CONSOLE

LAPTOP, HEAD = ({"CPU": 2.0},), ({"CPU": 0.0},)
GPU_BOX, GPU_NODE = {"CPU": 16.0, "GPU": 1.0}, {"CPU": 96.0, "GPU": 8.0}
CPU = {"CPU": 1.0}

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
    (HEAD, {}, 1, CPU),
    (HEAD, {"num_workers": 64}, 64, CPU),
    (HEAD, {"use_gpu": True}, 1, {"GPU": 1 / 4}),
    (HEAD, {"use_gpu": True, "num_workers": 8}, 8, {"GPU": 1 / 4}),
]


@pytest.mark.parametrize(("nodes", "given", "most", "per_worker"), PLANS)
def test_workers_are_as_many_as_the_cluster_has_or_as_were_asked_for(
    nodes: Any, given: Any, most: int, per_worker: Any
) -> None:
    config = ScoreConfig(model="m", input=("i",), output="o", **given)
    cluster = ClusterResources(nodes)
    use_gpu = cluster.total("GPU") > 0 if config.use_gpu is None else config.use_gpu
    planned = plan_workers(config, cluster, use_gpu=use_gpu)
    assert planned == WorkerPlan(1, most, per_worker, threads=None)


def test_a_gpu_takes_as_many_as_share_it() -> None:
    for number in (1, 2, 3, 4):
        share = round(1 / number, 4)  # as Ray does
        assert ClusterResources(({"GPU": 1.0},)).workers_that_fit({"GPU": share}) == number


PRECISIONS: list[tuple[str | None, str | None, bool, str, str]] = [
    # Asked for, of the model, whether bfloat16 is fast; what is taken, and why if it differs.
    (None, "bf16", True, "bf16", ""),
    (None, "fp32", True, "fp32", ""),
    (None, None, True, "fp32", ""),
    (None, "bf16", False, "fp32", "these CPUs have no fast bfloat16"),
    ("bf16", "bf16", False, "bf16", ""),
    ("fp32", "bf16", True, "fp32", "--precision"),
]


@pytest.mark.parametrize(("asked", "of_model", "is_fast", "taken", "why"), PRECISIONS)
def test_the_precision_is_that_of_the_model_where_it_is_fast(
    asked: Any, of_model: str, is_fast: bool, taken: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(CONSOLE, "say", lines.append)
    monkeypatch.setattr(job, "faster_with_bf16", lambda _: is_fast)
    config = ScoreConfig(model="m", input=("i",), output="o", precision=asked)
    description = {"precision": of_model} if of_model else {}
    request: Any = SimpleNamespace(config=config, description=description)
    assert choose_precision(request, CONSOLE, use_gpu=False) == taken
    said = f"scoring in {taken} ({why}); the model was trained in {of_model}"
    assert lines == ([said] if why else [])


KEPT = "what is scored is kept, and the same command continues"
AT_START = "no CUDA"
IN_WORK = (
    "workers died again and again (it died); in work were a.parquet; give the workers more mem"
)
ENDS: list[tuple[BaseException, str]] = [
    (KeyboardInterrupt(), KEPT),
    (RayActorError(error_msg="it died"), IN_WORK),
    (OutOfMemoryError("it died"), IN_WORK),
    (RayActorError(error_msg=AT_START, actor_init_failed=True), f"{AT_START}; {KEPT}"),
]


@pytest.mark.parametrize(("error", "said"), ENDS)
def test_a_run_ends_with_one_line_that_says_how_to_resume(error: Any, said: str) -> None:
    config = ScoreConfig(model="m", input=("i",), output="o")
    run = Run(SimpleNamespace(config=config))  # type: ignore[arg-type]
    run.in_work = {
        7: [Part("a-0", "a.parquet", 1, "e", 0, 1), Part("a-1", "a.parquet", 1, "e", 1, 1)]
    }
    line = str(explain_end(error, run, CONSOLE))
    assert line.startswith(said)
    assert line.endswith(KEPT)
    assert "\n" not in line
