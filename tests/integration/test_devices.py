"""A logical GPU of Ray that PyTorch cannot use, as on a Mac with Apple silicon, or with PyTorch's CPU build on a GPU machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from mnistsum_ray.cluster import resources
from mnistsum_ray.cluster.resources import Gpu, WorkerRequest, reserve
from mnistsum_ray.errors import RequestError, RunError, TryAgainError
from tests.integration.conftest import score_here, start_cluster, train_here
from tests.integration.test_refusals import Holder

EVERY = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA here"),
]

GPU = Gpu(bf16=True, memory_bytes=80 * 2**30)


@pytest.fixture
def counted_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster with two CPUs and one logical GPU that does not exist.

    It ends with the test: Ray keeps what workers that cannot start hold until the process that has asked for them leaves.
    """
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", start_cluster(num_cpus=2, num_gpus=1))
    yield
    ray.shutdown()


@pytest.fixture
def believed_gpu(counted_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU, which the jobs of this process take for real: they go as far as one can without it."""
    monkeypatch.setattr(resources, "_ask_for_cuda", lambda *_: GPU)


@pytest.mark.usefixtures("counted_gpu")
def test_a_job_runs_on_cpus_and_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"^--use-gpu true: Ray counts GPUs on node .*, but PyTorch has no CUDA there; install",
    ):
        reserve(WorkerRequest(None, True, wait_seconds=0), print)
    scored = score_here(model, tmp_path / "out", data, number_column="digit")
    assert scored.line["scored_rows"] == 500
    assert scored.said.count("running on CPUs: Ray counts GPUs on node ") == 1
    assert "1 CPU worker" in scored.said


@pytest.mark.usefixtures("believed_gpu")
def test_scoring_waits_for_a_gpu_that_another_job_holds_and_its_workers_get_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    other = ray.remote(Holder).options(num_gpus=0.5, num_cpus=0).remote()
    ray.get(other.__ray_ready__.remote())
    said = list[str]()
    with pytest.raises(
        TryAgainError, match=r"^needs 1 GPU, but after 2 s only 2 CPUs and 0.5 GPUs are free"
    ):
        reserve(WorkerRequest(None, True, wait_seconds=2, group=True), said.append)
    assert said[0].startswith("waiting for 1 GPU; free now: ")
    ray.kill(other)
    with pytest.raises(
        RunError,
        match=r"^AssertionError: Torch not compiled with CUDA enabled; what is scored is kept",
    ):
        score_here(model, tmp_path / "out", data, number_column="digit", use_gpu=True)


@pytest.mark.usefixtures("believed_gpu")
def test_training_workers_get_the_gpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="doesn't have NCCL built in; checkpoints are kept"):
        train_here(data=data, storage_path=tmp_path, use_gpu=True, max_failures=0)
