"""Check that PyTorch can use the GPUs that Ray counts.

Ray counts a GPU on every Mac with Apple silicon, and NVIDIA's by their driver, whichever build of PyTorch is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import ray
import ray.exceptions

from mnistsum_ray.cluster.resources import ClusterResources, format_resource, inspect_cluster, wait_until_free
from mnistsum_ray.errors import RequestError, root_cause

_PROBE_SECONDS: Final = 60.0
"""Shortest timeout of a probe: its process on another node has to import PyTorch first."""


@dataclass(frozen=True)
class GpuProbe:
    """What PyTorch finds on a node that has a logical GPU of Ray."""

    cuda: bool
    """CUDA is available."""
    bf16: bool
    """CUDA is available and the GPU is faster with bfloat16 than with float32."""
    torch: str
    """PyTorch's version."""
    memory_bytes: int
    """Memory of the GPU; 0 without CUDA."""


def drop_unusable_gpus(
    cluster: ClusterResources, use_gpu: bool | None, wait_seconds: float, say: Callable[[str], None]
) -> tuple[ClusterResources, GpuProbe | None]:
    """Probe a GPU, and return the cluster without its GPUs if PyTorch cannot use them.

    Args:
        cluster: from `inspect_cluster`.
        use_gpu: as requested; None uses GPUs where PyTorch can and one is free.
        wait_seconds: longest wait for a GPU that is free for the probe.
        say: writes a console line.

    Returns:
        The cluster, and the probe; None instead of the probe if the run uses no GPU.

    Raises:
        RequestError: GPUs are requested and PyTorch cannot use them, or none becomes free.
    """
    if use_gpu is False or not cluster.total.get("GPU"):
        return cluster, None
    if use_gpu is None and cluster.free.get("GPU", 0) < 1:
        say(f"running on CPUs: other jobs hold the GPUs ({cluster.describe()}); --use-gpu true waits for one")
        return cluster.without_gpus(), None
    wait_until_free([{"GPU": 1.0}], wait_seconds, say)
    probe = probe_gpu(wait_seconds)
    if probe.cuda:
        return cluster, probe
    check_cuda(probe, use_gpu)
    say(f"running on CPUs: {_no_cuda(probe, cluster)}")
    return cluster.without_gpus(), None


def probe_gpu(wait_seconds: float) -> GpuProbe:
    """Run a probe on a node with a free GPU.

    Raises:
        RequestError: the probe did not run in time, because another job has taken the GPU meanwhile, or the node was lost.
    """
    timeout = max(_PROBE_SECONDS, wait_seconds)
    probe = ray.remote(num_gpus=1, num_cpus=0)(_probe).remote()
    try:
        found: GpuProbe = ray.get(probe, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(probe)
        raise RequestError(
            f"no GPU was free as a whole for {timeout:.0f} s; other jobs hold them, so wait, or give more --wait-seconds"
        ) from None
    except ray.exceptions.RayError as error:
        raise RequestError(
            f"the node with a GPU could not be asked whether PyTorch has CUDA there: {root_cause(error)}"
        ) from None
    return found


def _probe() -> GpuProbe:
    import torch

    from mnistsum_ray.model.device import faster_with_bf16

    cuda = torch.cuda.is_available()
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    return GpuProbe(cuda, cuda and faster_with_bf16(torch.device("cuda")), torch.__version__, memory_bytes)


def check_cuda(probe: GpuProbe, use_gpu: bool | None) -> None:
    """Raise RequestError if GPUs are requested and the probe found no CUDA."""
    if use_gpu and not probe.cuda:
        raise RequestError(
            f"--use-gpu true: {_no_cuda(probe, inspect_cluster())}; install a CUDA build of PyTorch there, or leave --use-gpu out"
        )


def _no_cuda(probe: GpuProbe, cluster: ClusterResources) -> str:
    return f"Ray counts {format_resource(cluster.total, 'GPU')}, but PyTorch {probe.torch} has no CUDA there"
