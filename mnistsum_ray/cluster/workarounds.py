"""What Ray 2.60.0 does wrong and costs a user data or minutes, worked around.

Private names stand here alone, and each function works without them too: ruff refuses them
elsewhere.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray

_RENAMED: Final = (ImportError, AttributeError, TypeError)  # where Ray has renamed something


def last_cluster_address() -> str | None:
    """Return HOST:PORT of the cluster that `ray start` last started here, running or not.

    `ray.init` takes it from the same file, and tries for minutes where that cluster has crashed.
    """
    with suppress(*_RENAMED):
        return ray._private.utils.read_ray_address() or None  # noqa: TID251
    return None


def in_order(dataset: Any) -> Any:
    """Return a Dataset whose rows keep their order; by default the fastest task comes first."""
    with suppress(*_RENAMED):
        dataset = dataset.copy(dataset, _deep_copy=True)  # the given one keeps its options
    dataset.context.execution_options.preserve_order = True
    return dataset


def free_cpus() -> list[int]:
    """Return whole CPUs that are free on each node; none where Ray does not tell.

    Ray says late that a CPU is free again: three seconds are waited for all.
    """
    free: list[int] = []
    with suppress(*_RENAMED):
        for _ in range(30):
            nodes = ray._private.state.available_resources_per_node()  # noqa: TID251
            free = [int(node.get("CPU", 0)) for node in nodes.values()]
            if sum(free) == ray.cluster_resources().get("CPU", 0):
                break
            time.sleep(0.1)
    return free


@contextmanager
def default_environment(defaults: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for options that Ray has nowhere else; those of the user stay."""
    missing = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def ctrl_c_as_before() -> Iterator[None]:
    """Restore the handler of SIGINT when Ray Train has replaced it, in the main thread.

    Ray's ends the workers and then the process, with exit code 0: that becomes an interrupt.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
