"""A job on a cluster: CPUs that others hold, and GPUs that PyTorch cannot use."""

from pathlib import Path

import pytest
import ray
import torch

from mnistsum_ray.errors import RequestError
from tests.integration.conftest import score_here, start_cluster, train_here


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has CUDA here")
@pytest.mark.slow
def test_without_cuda_a_job_runs_on_cpus_and_says_so(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Ray counts a GPU on a Mac, and where PyTorch is a CPU build."""
    ray.shutdown()
    start_cluster(num_cpus=2, num_gpus=1)
    said = r"^--use-gpu true: Ray counts GPUs on node .*, but PyTorch has no CUDA there; install"
    with pytest.raises(RequestError, match=said):
        train_here(data=data, storage_path=tmp_path, use_gpu=True, wait_seconds=0)
    scored = score_here(model, tmp_path / "out", data, number_column="digit")
    assert scored.line["scored_rows"] == 1000
    assert scored.said.count("running on CPUs: Ray counts GPUs on node ") == 1
    assert "1 CPU worker" in scored.said
    ray.shutdown()
