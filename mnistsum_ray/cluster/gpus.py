"""What PyTorch finds on the GPUs that Ray counts: a trial on each node that has some."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.exceptions

from mnistsum_ray.cluster.nodes import on_node, usable_nodes
from mnistsum_ray.cluster.ray_internals import free_resources
from mnistsum_ray.errors import explained, root_cause, shortened

REPORT_SECONDS: Final = 15.0
"""Interval of the console lines that say what is waited for."""

_OTHERS_SECONDS: Final = 10.0
"""Longest wait for the GPUs of other nodes once one has answered: another job may have taken them meanwhile."""


@dataclass(frozen=True)
class Gpu:
    """What PyTorch finds on a GPU that Ray counts."""

    bf16: bool
    """It is faster with bfloat16 than with float32."""
    memory_bytes: int
    mig: bool = False
    """It is an instance of a card with MIG on."""


Probe = dict["ray.ObjectRef[Gpu | str]", dict[str, Any]]
"""Running tasks that ask a GPU, and Ray's entry of the node of each."""


def begin_probe(use_gpu: bool | None) -> Probe | None:
    """Begin to try PyTorch where a GPU is free, which takes as long as its import there; None if none is wanted, or free."""
    return None if use_gpu is False else _ask(_idle_nodes()) or None


def ask_nodes() -> Probe:
    """Ask each node with a free GPU; where none has one, each with a GPU, which answers when other jobs have given it back."""
    return _ask(_idle_nodes() or [node for node in usable_nodes() if node["Resources"].get("GPU")])


def _idle_nodes() -> list[dict[str, Any]]:
    """The nodes that have a GPU of which nobody uses a part."""
    free = free_resources()
    return [node for node in usable_nodes() if free.get(node["NodeID"], {}).get("GPU", 0) >= 1]


def _ask(nodes: list[dict[str, Any]]) -> Probe:
    ask = ray.remote(num_gpus=1)(_ask_torch)
    return {ask.options(**on_node(node["NodeID"])).remote(): node for node in nodes}


def answers_of(probe: Probe, seconds: float, say: Callable[[str], None]) -> list[tuple[dict[str, Any], Gpu | str]]:
    """The answers of a probe, with their nodes. Waits until a GPU can be used, and then a little for the others."""
    end = time.monotonic() + seconds
    waiting = list(probe)
    answers: list[tuple[dict[str, Any], Gpu | str]] = []
    usable = False
    while waiting and (left := end - time.monotonic()) > 0:
        done, waiting = ray.wait(waiting, timeout=min(left, REPORT_SECONDS))
        if not done and not usable and left > REPORT_SECONDS:
            say(f"waiting for a GPU to answer: other jobs hold them, or PyTorch is being imported there; {left:.0f} s left")
        for reference in done:
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                answer = f"it could not be asked whether PyTorch has CUDA there: {root_cause(error)}"
            answers.append((probe[reference], answer))
            if isinstance(answer, Gpu) and not usable:
                usable = True
                end = min(end, time.monotonic() + _OTHERS_SECONDS)
    for reference in waiting:
        ray.cancel(reference, force=True)  # else an import would hold the GPU to its end
    return answers


def _ask_torch() -> Gpu | str:
    """The GPU of this task, or why PyTorch cannot use it. Ray ends the process of a task with a GPU, and so frees its memory."""
    import torch
    import torch.nn.functional as F

    from mnistsum_ray.model.device import faster_with_bf16

    device, build = torch.device("cuda"), f"PyTorch {torch.__version__}"
    try:
        card = torch.cuda.get_device_properties(device)
        build += f" on {card.name} (compute capability {card.major}.{card.minor})"
        bf16 = faster_with_bf16(device)
        # `is_available` is true also on a card that is too old for the kernels of this build of PyTorch.
        images = torch.ones(8, 64, 14, 14, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
        F.conv2d(images, images[:, :, :3, :3].contiguous()).sum().item()
    except AssertionError:  # a build for CPUs
        return f"{build} has no CUDA there"
    except RuntimeError as error:
        return explained(shortened(f"{build} cannot use it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"))
    mig = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-") or " MIG " in card.name
    return Gpu(bf16, card.total_memory, mig)
