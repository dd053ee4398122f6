"""Tasks on the cluster: options of Ray Data for them, and the number of their crashes."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

MAX_CRASHES: Final = 3
"""Processes that may die in the same work before it is given up: Ray alone would start new ones for ever."""

CAUSES: Final = "out of memory? Ray's logs may tell"

_CONTEXT_LOCK: Final = threading.RLock()
"""The current DataContext belongs to the process and not to a thread, and datasets are created in several threads."""


@contextmanager
def ray_data_options(*, preserve_order: bool, object_store_bytes: int | None = None) -> Iterator[None]:
    """Set options for the datasets that are created in the block; those of the user keep theirs.

    A generator must not yield inside. No task is started, and the execution sleeps, while blocks of
    `object_store_bytes` wait for the consumer; None: half of the store.
    """
    from ray.data import DataContext

    from mnistsum_ray.cluster.workarounds import PatientExecution

    with _CONTEXT_LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = preserve_order
        if object_store_bytes is not None:
            context.custom_execution_callback_classes += [PatientExecution]
            options = context.execution_options
            limits = options.resource_limits.copy(object_store_memory=object_store_bytes)
            options.resource_limits = limits
        with DataContext.current(context):
            yield


class CrashCounter:
    """Counts how often each key was begun and not ended; an actor, since who began may have died."""

    def __init__(self) -> None:
        self._nodes: dict[str, list[str]] = defaultdict(list)
        """Of the attempts of each key."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt; return how many have not ended, save those whose node was lost."""
        import ray

        if nodes := self._nodes[key]:
            lost = {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}
            nodes[:] = [other for other in nodes if other not in lost]
        nodes.append(node)
        return len(nodes)

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        self._nodes.pop(key, None)


@contextmanager
def crash_counter() -> Iterator[Any]:
    """A `CrashCounter` actor for the block, on this node: losing another one loses no counts."""
    import ray

    from mnistsum_ray.cluster.nodes import on_node

    # Started again where memory is short: a lost count must not end the work.
    counter = ray.remote(CrashCounter).options(**on_node(), max_restarts=-1, max_task_retries=-1).remote()
    try:
        yield counter
    finally:  # an error's traceback would keep it
        with suppress(Exception):  # the cluster may have ended
            ray.kill(counter)


def begin(counter: Any, key: str) -> int:
    """Count an attempt of this process (`CrashCounter.begin`); one that survives calls `end`."""
    import ray

    return int(ray.get(counter.begin.remote(key, ray.get_runtime_context().get_node_id())))
