"""Tests that need a GPU: `pytest -m gpu tests/gpu`. Those of two cards are skipped where there is one.

test_model.py needs no Ray, and the gate runs parts of it on the CPU. To a machine that reaches no
package index, carry the wheels that it lacks.
"""

from collections.abc import Iterator

import pytest
import torch

from mnistsum_ray.model.device import disable_tf32

CUDA = torch.device("cuda")

_FIGURES: list[tuple[str, str]] = []


def report(what: str, **figures: float | str) -> None:
    """Add a row to the table that pytest prints at the end."""
    texts = (
        f"{name} {value if isinstance(value, str) else format(value, ',.4g')}"
        for name, value in figures.items()
    )
    _FIGURES.append((what, ", ".join(texts)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("figures of the GPU")
        for what, text in _FIGURES:
            terminalreporter.line(f"{what:60} {text}")


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def exact_float32_on_one_thread() -> Iterator[None]:
    """Float32 as in the jobs' workers, and one thread, see tests/model/conftest.py; afterwards as it was."""
    before, threads = (
        (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        torch.get_num_threads(),
    )
    disable_tf32()
    torch.set_num_threads(1)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.set_num_threads(threads)
