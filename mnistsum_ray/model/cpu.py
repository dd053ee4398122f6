"""The kind of CPU of this machine, read from /proc/cpuinfo: PyTorch, which knows it too, takes seconds to import."""

from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")


def describe_cpu() -> dict[str, str]:
    """The entries of the first core, such as `model name` and `flags`; empty on other systems."""
    if not _CPUINFO.exists():
        return {}
    first = _CPUINFO.read_text().partition("\n\n")[0]
    entries = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def cpu_faster_with_bf16() -> bool:
    """True if this CPU multiplies bfloat16 faster than float32.

    AVX512-BF16 alone is not enough on Intel: without AMX it does half as much as float32 (162
    against 322 GFLOP/s on two cores of an Emerald Rapids). AMD's cores do twice as much with it.
    """
    cpu = describe_cpu()
    flags = cpu.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and cpu.get("vendor_id") != "GenuineIntel")
