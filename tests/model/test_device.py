"""Which device a process takes."""

import pytest

from mnistsum_ray.model.device import cuda_index


@pytest.mark.parametrize(
    ("gpu", "visible", "index"),
    [
        ("3", "3", 0),  # as Ray leaves it: only its own is visible
        ("3", None, 3),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1: all are
        ("3", "", 3),
        ("5", "4,5,6", 1),  # the same on a node that was started with some of its GPUs
        ("GPU-1a2b", "GPU-9f9f,GPU-1a2b", 1),
        ("GPU-1a2b", None, 0),
    ],
)
def test_a_process_takes_the_gpu_that_ray_gave_it(gpu: str, visible: str | None, index: int) -> None:
    assert cuda_index(gpu, visible) == index
