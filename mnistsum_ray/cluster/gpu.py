"""TODO cluster.gpu"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import ray
import ray.exceptions

from mnistsum_ray.cluster.resources import Cluster, count_of, inspect_cluster, wait_until_free
from mnistsum_ray.errors import RequestError, last_line

_PROBE_SECONDS: Final = 60.0
"""A process on another node has PyTorch to import first."""


@dataclass(frozen=True)
class GpuProbe:
    """What PyTorch finds on a node that has a logical GPU of Ray."""

    cuda: bool
    bf16: bool
    """Whether bfloat16 is faster there than float32."""
    torch: str
    """PyTorch's version."""


def usable_cluster(
    cluster: Cluster, use_gpu: bool | None, wait_seconds: float, say: Callable[[str], None]
) -> tuple[Cluster, GpuProbe | None]:
    """The cluster, without GPUs that PyTorch cannot use, and what it finds there; None where no GPU was asked for or is there.

    Ray counts a GPU on every Mac with Apple silicon, and NVIDIA's by their driver whichever PyTorch is installed.

    Args:
        cluster: as `inspect_cluster` gives it.
        use_gpu: the request; None takes GPUs where they can be used.
        wait_seconds: how long to wait for a GPU to become free to ask.
        say: takes a line for the console.

    Raises:
        RequestError: GPUs are asked for and PyTorch cannot use them, or none becomes free.
    """
    if use_gpu is False or not cluster.total.get("GPU"):
        return cluster, None
    wait_until_free([{"GPU": 1.0}], wait_seconds, say)
    probe = probe_gpu(wait_seconds)
    if probe.cuda:
        return cluster, probe
    check_cuda(probe, use_gpu)
    say(f"running on CPUs: {_no_cuda(probe, cluster)}")
    return cluster.without_gpus(), None


def probe_gpu(wait_seconds: float) -> GpuProbe:
    """Ask a node with a free GPU whether PyTorch has CUDA there.

    Raises:
        RequestError: none answered for so long, since another job has taken the GPU meanwhile, or the node was lost.
    """
    asked = ray.remote(num_gpus=1, num_cpus=0)(_probe).remote()
    try:
        found: GpuProbe = ray.get(asked, timeout=max(_PROBE_SECONDS, wait_seconds))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked)
        raise RequestError(
            f"no GPU was free as a whole for {max(_PROBE_SECONDS, wait_seconds):.0f} s; other jobs hold them, so wait, or give "
            "more --wait-seconds"
        ) from None
    except ray.exceptions.RayError as error:
        raise RequestError(f"the node with a GPU could not be asked whether PyTorch has CUDA there: {last_line(error)}") from None
    return found


def _probe() -> GpuProbe:
    import torch

    from mnistsum_ray.model.device import faster_with_bf16

    cuda = torch.cuda.is_available()
    return GpuProbe(cuda, cuda and faster_with_bf16(torch.device("cuda")), torch.__version__)


def check_cuda(probe: GpuProbe, use_gpu: bool | None) -> None:
    """Raise RequestError where GPUs are asked for and PyTorch has no CUDA there."""
    if use_gpu and not probe.cuda:
        raise RequestError(
            f"--use-gpu true: {_no_cuda(probe, inspect_cluster())}; install a CUDA build of PyTorch there, or leave --use-gpu out"
        )


def _no_cuda(probe: GpuProbe, cluster: Cluster) -> str:
    return f"Ray counts {count_of(cluster.total, 'GPU')}, but PyTorch {probe.torch} has no CUDA there"
