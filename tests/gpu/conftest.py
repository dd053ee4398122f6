"""Tests that need a GPU: `pytest -m gpu tests/gpu`. Those of two cards are skipped where is one.

test_model.py needs no Ray, and the gate runs parts of it on the CPU.
"""

from collections.abc import Iterator

import pytest
import torch

from mnistsum_ray.model.device import disable_tf32

CUDA = torch.device("cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"needs a GPU, and PyTorch {torch.__version__} has no CUDA here")


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def exact_float32_on_one_thread() -> Iterator[None]:
    """Float32 as in the jobs' workers, and one thread, see tests/model/conftest.py."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    threads = torch.get_num_threads()
    disable_tf32()
    torch.set_num_threads(1)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul
    torch.set_num_threads(threads)
