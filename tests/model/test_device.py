"""The precision that is chosen for a kind of hardware."""

import pytest
import torch

from mnistsum_ray.model import device

INTEL, AMD = "GenuineIntel", "AuthenticAMD"
HARDWARE = [
    ({"vendor_id": INTEL, "flags": "avx512f avx512_bf16 amx_bf16"}, True),
    ({"vendor_id": INTEL, "flags": "avx512f avx512_bf16"}, False),  # half as fast as float32
    ({"vendor_id": AMD, "flags": "avx512f avx512_bf16"}, True),
    ({"vendor_id": AMD, "flags": "avx512f"}, False),
    ({}, False),  # not Linux
    ((7, 5), False),
    ((8, 0), True),
    ((9, 0), True),
]


@pytest.mark.parametrize(("hardware", "is_faster"), HARDWARE)
def test_bfloat16_is_chosen_where_it_is_faster(
    hardware: dict[str, str] | tuple[int, int], is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hardware` is an entry of /proc/cpuinfo, or what a GPU is capable of."""
    monkeypatch.setattr(device, "describe_cpu", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: hardware)
    kind = "cuda" if isinstance(hardware, tuple) else "cpu"
    assert device.faster_with_bf16(torch.device(kind)) is is_faster
