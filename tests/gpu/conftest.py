"""Tests that need a GPU: `pytest -m gpu tests/gpu`. Ten minutes on one card; those of two cards are skipped where there is one.

test_model.py needs PyTorch, numpy, pyarrow, Pillow, safetensors, tqdm and pytest; the gate runs parts of it on the CPU.
test_jobs.py also needs Ray, all else that the package depends on, and pytest-timeout; it is skipped without Ray. To a machine
that reaches no package index, carry the wheels that it lacks. Ray's has 75.6 MiB (cp312), or 44.5 without `ray/jars`, which only
Java uses.
"""

from collections.abc import Iterator

import pytest
import torch

from mnistsum_ray.model.device import disable_tf32

CUDA = torch.device("cuda")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """As in the jobs' workers; afterwards as it was."""
    before, threads = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32), torch.get_num_threads()
    disable_tf32()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.set_num_threads(threads)  # a Predictor on a CPU sets it for the process
