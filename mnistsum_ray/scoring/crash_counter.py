"""Counter of crashed worker processes per part, kept in an actor. It has its own module so that the actor imports no torch."""

from collections import defaultdict
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_crash_counter() -> Any:
    """Start a `CrashCounter` actor on the driver's node, so that losing another node does not lose the counts."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(CrashCounter).options(num_cpus=0, scheduling_strategy=this_node).remote()


class CrashCounter:
    """Counts how often each key was begun without being ended. An actor, because the process that began it may have died."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = defaultdict(list)
        """The node of each attempt."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt on a node; return the number of attempts that have not ended, this one included.

        An attempt that ended with its node does not count: the node was lost, and not for what it worked on.
        """
        attempts = self._begun[key]
        if attempts:
            lost = {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}
            attempts[:] = [attempt for attempt in attempts if attempt not in lost]
        attempts.append(node)
        return len(attempts)

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        del self._begun[key]
