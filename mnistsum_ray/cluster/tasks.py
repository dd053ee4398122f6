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
    """Set options for the datasets that are created in the block, which copy them; those of the user keep theirs.

    A generator must not yield inside the block. With `preserve_order` blocks come in the order of their input. No task is
    started, and the execution sleeps, while blocks of `object_store_bytes` wait for the consumer; None: half of the store.
    """
    from ray.data import DataContext

    from mnistsum_ray.cluster.ray_internals import PatientExecution

    with _CONTEXT_LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = preserve_order
        if object_store_bytes is not None:
            context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, PatientExecution]
            limits = context.execution_options.resource_limits
            context.execution_options.resource_limits = limits.copy(object_store_memory=object_store_bytes)
        with DataContext.current(context):
            yield


class CrashCounter:
    """Counts how often each key was begun without being ended. An actor, because the process that began it may have died."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = defaultdict(list)
        """The node of each attempt."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt on a node; return the number of attempts that have not ended, save those whose node was lost."""
        import ray

        attempts = self._begun[key]
        if attempts:
            lost = {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}
            attempts[:] = [attempt for attempt in attempts if attempt not in lost]
        attempts.append(node)
        return len(attempts)

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        self._begun.pop(key, None)


@contextmanager
def crash_counter() -> Iterator[Any]:
    """The handle of a `CrashCounter` actor for the block, on this node: losing another node does not lose the counts."""
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
    """Count an attempt of this process, see `CrashCounter.begin`; when it has survived, it calls `end`."""
    import ray

    return int(ray.get(counter.begin.remote(key, ray.get_runtime_context().get_node_id())))
