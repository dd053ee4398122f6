"""Tests that need a GPU: `pytest -m gpu`. Ten minutes on one card."""

from collections.abc import Iterator

import pytest
import torch

from mnistsum_ray.model.device import disable_tf32
from tests.integration.conftest import cluster, no_cluster_is_left, s3

__all__ = ["cluster", "no_cluster_is_left", "s3"]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """As in the jobs' workers; afterwards as it was."""
    before, threads = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32), torch.get_num_threads()
    disable_tf32()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.set_num_threads(threads)  # a Predictor on a CPU sets it for the process
