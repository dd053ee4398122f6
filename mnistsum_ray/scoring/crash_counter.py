"""Counter of crashed worker processes per part, kept in an actor. It has its own module so that the actor imports no torch."""

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_crash_counter() -> Any:
    """Start a `CrashCounter` actor on the driver's node, so that losing another node does not lose the counts."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(CrashCounter).options(num_cpus=0, scheduling_strategy=this_node).remote()


class CrashCounter:
    """Counts how often each key was started without being ended. An actor, because the process that began it may have died."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, key: str) -> int:
        """Count an attempt and return the number of attempts that have not ended, this one included."""
        self._begun[key] += 1
        return self._begun[key]

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        del self._begun[key]
