"""Selection of the GPU of a process."""

import pytest

from mnistsum_ray.model.device import cuda_index


@pytest.mark.parametrize(
    ("gpu", "visible", "count", "index"),
    [
        ("3", "3", 1, 0),  # Ray's default: only the assigned GPU is visible
        ("3", None, 4, 3),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1: all GPUs are visible
        ("5", "4,5,6", 3, 1),  # the same setting on a node that was started with some of its GPUs
        ("GPU-1a2b", "GPU-9f9f,GPU-1a2b", 2, 1),
        ("MIG-b", "MIG-a,MIG-b", 1, 0),  # a process sees one instance
        ("1", None, 1, 0),  # AMD: Ray has set HIP_VISIBLE_DEVICES
    ],
)
def test_cuda_index_is_that_of_the_gpu_assigned_by_ray(gpu: str, visible: str | None, count: int, index: int) -> None:
    assert cuda_index(gpu, visible, count) == index
