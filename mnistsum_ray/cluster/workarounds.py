"""What Ray 2.60.0 does wrong and costs a user data or minutes, worked around with private names.

Each works without its name too. ruff refuses private names elsewhere.
"""

from contextlib import suppress
from typing import Any, Final

import ray

_GONE: Final = (ImportError, AttributeError, TypeError)  # where Ray has renamed something


def last_cluster_address() -> str | None:
    """HOST:PORT of the cluster that `ray start` started last on this machine, running or not.

    `ray.init` takes it from the same file, and tries for minutes where that cluster has crashed.
    """
    with suppress(*_GONE):
        return ray._private.utils.read_ray_address() or None  # noqa: TID251
    return None


def in_order(dataset: Any) -> Any:
    """A Dataset whose rows come in their order; by default it is that of the fastest task."""
    with suppress(*_GONE):
        dataset = dataset.copy(dataset, _deep_copy=True)  # the given one keeps its options
    dataset.context.execution_options.preserve_order = True
    return dataset
