"""What a process does about its hardware before it trains or scores. Nothing of Ray."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any, Final

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_KEEP_BYTES: Final = 2**30
_OLD_KEEP_BYTES: Final = 2**25
"""The most that glibc takes before 2.35."""


def tune_malloc() -> None:
    """Have glibc keep what is freed: given back and faulted in again, activations cost a fifth of a step on a CPU.

    Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) or libc.mallopt(_M_MMAP_THRESHOLD, _OLD_KEEP_BYTES)):
        return  # the other two alone would have it give back even small pieces
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**28)


def disable_tf32() -> None:
    """Have GPUs compute float32 as float32: TF32, cuDNN's default, would keep 10 of the 23 bits."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def enable_determinism() -> None:
    """Have this process compute the same bits each time."""
    # `use_deterministic_algorithms` does the same, and takes a second to import a compiler that is not used.
    torch.set_deterministic_debug_mode("error")
    # Filling what is about to be overwritten only helps to find reads of it, and costs a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def faster_with_bf16(device: torch.device) -> bool:
    """Whether this hardware multiplies bfloat16 natively, and so faster than float32.

    Decided by what the hardware is and never by a measurement, which would one day come out the other way and change the
    numbers of a run. AVX512-BF16 alone is not enough on Intel, where without AMX it does half as much as float32 (162 beside
    322 GFLOP/s on two cores of an Emerald Rapids whose AMX is masked); AMD's cores do twice as much with it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and "intel" not in str(has.get("cpu_name", "")).lower()))


def cuda_index(gpu: str, visible: str | None) -> int:
    """PyTorch's index of a GPU of this process.

    Ray makes just that one visible, as index 0, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES keeps it from doing so: then
    all are visible, and the process has to choose its own.

    Args:
        gpu: one of `ray.get_gpu_ids()`: a number, or a name such as GPU-1a2b….
        visible: CUDA_VISIBLE_DEVICES of this process.
    """
    devices = visible.split(",") if visible else []
    if gpu in devices:
        return devices.index(gpu)
    return int(gpu) if gpu.isdecimal() and not devices else 0


def hardware(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on: this machine's CPU, cores and instructions for small numbers, and the GPU if it is one."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": sorted(name for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni") if flags.get(name)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
