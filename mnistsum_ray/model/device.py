"""What this process computes on: the device, its settings, and the other training workers."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn


def tune_malloc() -> None:
    """Let glibc, where it is the C library, keep freed memory.

    Activations that are given back and faulted in again cost a fifth of a training step on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # in glibc's malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    # glibc before 2.35 takes less: then the two others, which fix mmap_threshold, stay unset.
    if mallopt(mmap_threshold, 2**30):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def disable_tf32() -> None:
    """Make GPUs compute float32 in full: TF32, cuDNN's default, keeps 10 of the 23 bits."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def enable_determinism() -> None:
    """Make this process compute the same bits each time; what cannot do so raises RuntimeError."""
    # `use_deterministic_algorithms` has the same effect, but imports a compiler, in a second.
    torch.set_deterministic_debug_mode("error")
    # Filling new tensors only helps to find bugs, and costs a fifth of a training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed PyTorch's generators of the CPU and of this device.

    `torch.manual_seed` would seek all kinds of devices, in 50 µs a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def describe_cpu() -> dict[str, str]:
    """Linux's entries of the first core, such as `model name` and `flags`; elsewhere none."""
    file = Path("/proc/cpuinfo")
    first, *_ = file.read_text().split("\n\n") if file.exists() else [""]
    entries = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def faster_with_bf16(device: torch.device) -> bool:
    """True if this kind of hardware multiplies bfloat16 faster than float32.

    A measurement would one day come out the other way and change the numbers of a run. On Intel
    AVX512-BF16 is not enough: without AMX it does half as much as float32 (162 against 322 GFLOP/s
    on two cores of an Emerald Rapids). AMD's cores do twice as much with it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    cpu = describe_cpu()
    flags = cpu.get("flags", "").split()
    is_intel = cpu.get("vendor_id") == "GenuineIntel"
    return "amx_bf16" in flags or ("avx512_bf16" in flags and not is_intel)


def array_to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor: on CPUs without a copy if possible, on GPUs without waiting."""
    tensor = torch.from_numpy(np.require(values, requirements="W"))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _several_workers() -> bool:
    # NCCL makes its communicator in the first collective, in 1 to 2 s: one worker needs none.
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Element-wise sum over all workers, on every worker, as a new tensor."""
    values = values.clone()
    if _several_workers():
        dist.all_reduce(values)
    return values


def broadcast_state(module: nn.Module) -> None:
    """Copy the parameters of rank 0 to all workers, in place: different CPUs round differently."""
    if _several_workers():
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Hardware of this machine, to be recorded with measurements."""
    return {
        "cpu": describe_cpu().get("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }
