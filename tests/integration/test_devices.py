"""A logical GPU of Ray that PyTorch cannot use, as on a Mac with Apple silicon, or with PyTorch's CPU build on a GPU machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from mnistsum_ray.api import fit, score
from mnistsum_ray.cluster import gpus, resources
from mnistsum_ray.cluster.gpus import Gpu
from mnistsum_ray.cluster.resources import WorkerRequest, reserve
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError, RunError
from tests.integration.conftest import add_node, nodes, score_here, start_cluster

EVERY = 10

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA here")]

GPU = Gpu(bf16=True, memory_bytes=80 * 2**30)
NO_CUDA = f"Ray counts 1 GPU, but PyTorch {torch.__version__}"


@pytest.fixture(scope="module")
def counted_gpu() -> Iterator[str]:
    """Start a cluster with two CPUs and one logical GPU that does not exist, and yield its address."""
    ray.shutdown()
    yield start_cluster(num_cpus=2, num_gpus=1)
    ray.shutdown()


@pytest.mark.parametrize("begun", [False, True])
def test_the_gpu_that_the_probe_gives_back_is_not_waited_for(
    counted_gpu: str, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    monkeypatch.setattr(gpus, "_ask_torch", lambda: GPU)
    said = list[str]()
    plan = reserve(WorkerRequest(None, True, wait_seconds=0), said.append, gpus.begin_probe(None) if begun else None)
    assert (plan.use_gpu, plan.gpu, said) == (True, GPU, [])


def answer_late() -> Gpu:
    time.sleep(2)
    return GPU


def fail(text: str) -> None:
    raise AssertionError(text)


def test_a_gpu_that_takes_long_to_answer_is_waited_for(counted_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "REPORT_SECONDS", 1)
    monkeypatch.setattr(gpus, "_ask_torch", answer_late)
    said = list[str]()
    assert [gpu for _, gpu in gpus.answers_of(gpus.ask_nodes(), 60, said.append)] == [GPU]
    assert "waiting for a GPU to answer: other jobs hold them, or PyTorch is being imported there" in said[0]
    assert not gpus.answers_of(gpus.ask_nodes(), 1, fail), "it gives up"
    while ray.available_resources().get("GPU", 0) < 1:
        time.sleep(0.1)


def test_a_job_runs_on_cpus_and_says_so(counted_gpu: str, model: Path, data: Path, tmp_path: Path) -> None:
    scored = score_here(model, tmp_path / "out", data, number_column="digit")
    assert scored.line["scored_rows"] == 500
    assert scored.said.count(f"running on CPUs: {NO_CUDA}") == 1
    assert "1 CPU worker" in scored.said


def test_a_gpu_that_another_job_holds_is_waited_for_only_where_one_is_asked_for(counted_gpu: str) -> None:
    other = ray.remote(_Other).options(num_gpus=0.5, num_cpus=0).remote()
    ray.get(other.__ray_ready__.remote())
    said = list[str]()
    assert reserve(WorkerRequest(None, None, wait_seconds=600), said.append).describe() == "2 CPU workers"
    assert said[0].startswith("running on CPUs: other jobs hold the GPUs (2 CPUs and 1 GPU on 1 node); --use-gpu true waits for")
    with pytest.raises(RequestError, match=r"needs 1 GPU, but after \d s only 0\.5 GPUs are free"):
        reserve(WorkerRequest(None, True, wait_seconds=2), said.append)
    assert said[1].startswith("waiting for 1 GPU; free now: 0.5 GPUs")
    ray.kill(other)


@pytest.fixture
def believed_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another such cluster, whose GPU the jobs of this process take for real: they go as far as one can without it.

    It ends with the test: Ray keeps what workers that cannot start hold until the process that has asked for them leaves.
    """
    ray.shutdown()
    monkeypatch.setattr(resources, "answers_of", lambda *_: [({}, GPU)])
    monkeypatch.setenv("RAY_ADDRESS", start_cluster(num_cpus=2, num_gpus=1))
    yield
    ray.shutdown()


@pytest.mark.usefixtures("believed_gpu")
def test_scoring_workers_get_the_gpu_and_only_pytorch_refuses_it(model: Path, data: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {"input": (str(data),), "number_column": "digit", "output": str(tmp_path / "out")}
    with pytest.raises(RunError, match=r"^AssertionError: Torch not compiled with CUDA enabled; committed files are kept"):
        score(ScoreConfig(model=str(model), use_gpu=True, **files))


@pytest.mark.usefixtures("believed_gpu")
def test_training_workers_get_the_gpu_and_only_pytorch_refuses_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(data=str(data), storage_path=str(tmp_path), name="mine", use_gpu=True, max_failures=0)
    with pytest.raises(RunError, match="gave up after 1 failure:"):
        fit(config)
    assert "1 GPU worker" in (printed := capsys.readouterr().err)
    assert "NCCL" in printed


def test_a_node_whose_gpu_is_broken_gets_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    with nodes(0) as cluster:
        for _ in range(2):
            add_node(cluster, gpus=1)
        ray.init(cluster.address, log_to_driver=False)
        broken = sorted(node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU"))[0]
        monkeypatch.setattr(gpus, "_ask_torch", lambda: "broken" if ray.get_runtime_context().get_node_id() == broken else GPU)
        said = list[str]()
        plan = reserve(WorkerRequest(None, None, wait_seconds=10, group=True, useful_gpus=2), said.append)
        assert (plan.workers, len(said)) == (1, 1)
        assert "are not used: broken" in said[0]
        where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
        used = ray.get([where.options(num_gpus=1, label_selector=plan.label_selector).remote() for _ in range(3)])
        assert broken not in used
        ray.shutdown()


class _Other:
    """Another job's actor, which holds a part of the GPU."""
