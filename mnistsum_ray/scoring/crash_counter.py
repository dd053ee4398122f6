"""Which parts killed the processes that worked on them. In a module of its own, so that its actor need not import torch."""

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_crash_counter() -> Any:
    """The handle of a new `CrashCounter` actor, on this node so that it is not lost with another."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(CrashCounter).options(num_cpus=0, scheduling_strategy=here).remote()


class CrashCounter:
    """Counts how often each thing has been begun and not ended; an actor, since whoever began it may be dead."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, key: str) -> int:
        self._begun[key] += 1
        return self._begun[key]

    def end(self, key: str) -> None:
        del self._begun[key]
