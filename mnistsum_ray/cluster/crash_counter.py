"""Counts processes that die while they work on the same thing: Ray alone would start new ones for ever."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import ray

from mnistsum_ray.cluster.nodes import on_node

MAX_CRASHES: Final = 3
"""Processes that may die in the same work before it is given up."""

CAUSES: Final = "out of memory? Ray's logs may tell"


class CrashCounter:
    """Counts how often each key was begun without being ended. An actor, because the process that began it may have died."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = defaultdict(list)
        """The node of each attempt."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt on a node; return the number of attempts that have not ended, save those whose node was lost."""
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
    # Started again where memory is short: a lost count must not end the work.
    counter = ray.remote(CrashCounter).options(**on_node(), max_restarts=-1, max_task_retries=-1).remote()
    try:
        yield counter
    finally:  # an error's traceback would keep it
        with suppress(Exception):  # the cluster may have ended
            ray.kill(counter)


def begin(counter: Any, key: str) -> int:
    """Count an attempt of this process, see `CrashCounter.begin`; when it has survived, it calls `end`."""
    return int(ray.get(counter.begin.remote(key, ray.get_runtime_context().get_node_id())))
