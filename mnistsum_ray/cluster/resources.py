"""What the cluster has and what a run takes of it; what can never run is refused before anything starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import ray
import ray.exceptions
from ray.autoscaler.sdk import request_resources

from mnistsum_ray.errors import RequestError

TASKS_CPU_SHARE: Final = 0.25
"""What is left of the CPUs for other tasks at least: with all reserved by actors, those would wait for ever."""

_NODE_GROUP: Final = "ray.io/node-group"

_MAX_LIMIT: Final = 4096
"""Of anything: an autoscaler's configuration may say that there is no limit."""

_POLL_SECONDS: Final = 2.0
_REPORT_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Cluster:
    """Logical resources, in all and free at this moment."""

    nodes: tuple[dict[str, float], ...]
    """What each node has in all, of those that have CPUs or GPUs."""
    total: dict[str, float]
    free: dict[str, float]
    can_grow: bool
    """Whether an autoscaler may add nodes."""
    limits: dict[str, float] = field(default_factory=dict)
    """What the cluster can grow to, of the kinds for which its autoscaler says so."""

    @property
    def gpu_nodes(self) -> tuple[dict[str, float], ...]:
        return tuple(node for node in self.nodes if node.get("GPU"))

    def without_gpus(self) -> "Cluster":
        """The same cluster, for a job that cannot use its GPUs."""
        nodes = tuple({kind: amount for kind, amount in node.items() if kind != "GPU"} for node in self.nodes)
        total, free, limits = (
            {kind: amount for kind, amount in of.items() if kind != "GPU"} for of in (self.total, self.free, self.limits)
        )
        return replace(self, nodes=nodes, total=total, free=free, limits=limits)

    def places(self, each: dict[str, float]) -> int:
        """How many workers that reserve so much each fit on the nodes as they are."""
        return sum(min(int(node.get(kind, 0) / amount + 1e-9) for kind, amount in each.items() if amount) for node in self.nodes)

    def describe(self) -> str:
        """The cluster in words: `2 CPUs and 0 GPUs on 1 node`."""
        cpus, gpus = (count_of(self.total, kind) for kind in ("CPU", "GPU"))
        growing = ", and may grow" if self.can_grow else ""
        return f"{cpus} and {gpus} on {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}{growing}"


def inspect_cluster() -> Cluster:
    """Ask the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(
        nodes=tuple(dict(node["Resources"]) for node in alive if any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))),
        total=dict(ray.cluster_resources()),
        free=dict(ray.available_resources()),
        # What starts nodes by themselves, `ray up` and KubeRay, labels them with their kind.
        can_grow=any(_NODE_GROUP in node["Labels"] for node in alive),
        limits=_limits(),
    )


def _limits() -> dict[str, float]:
    """What the autoscaler's configuration allows; empty where there is none. Ray Data and Ray Train ask the same way."""
    from ray._private.state import state  # no public way to ask; of Ray 2.60

    limits = state.get_max_resources_from_cluster_config() or {}
    return {kind: float(min(amount, _MAX_LIMIT)) for kind, amount in limits.items() if amount}


def wait_until_free(bundles: list[dict[str, float]], seconds: float, say: Callable[[str], None]) -> None:
    """Wait until so much is free, since Ray would wait for ever and say nothing of it.

    Raises:
        RequestError: it is not, after so many seconds.
    """
    need = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in bundles[0]}
    started = time.monotonic()
    said = -_REPORT_SECONDS
    asked = False
    try:
        while True:
            cluster = inspect_cluster()
            missing = {kind: amount for kind, amount in need.items() if cluster.free.get(kind, 0) < amount - 1e-9}
            if not missing:
                return
            waited = time.monotonic() - started
            wanted = " and ".join(count_of(need, kind) for kind in need)
            free = " and ".join(count_of(cluster.free, kind) for kind in need)
            if waited >= seconds:
                raise RequestError(
                    f"needs {wanted}, but after {waited:.0f} s only {free} are free ({cluster.describe()}): other jobs hold the "
                    "rest, or the cluster has not grown; ask for fewer --num-workers or give more --wait-seconds"
                )
            if cluster.can_grow and not asked:
                request_resources(bundles=bundles)
                asked = True
            if waited - said >= _REPORT_SECONDS:
                say(f"waiting for {wanted}; free now: {free} ({cluster.describe()}); giving up in {seconds - waited:.0f} s")
                said = waited
            time.sleep(min(_POLL_SECONDS, max(0.1, seconds - waited)))
    finally:
        if asked:
            request_resources(bundles=[])  # it would hold the nodes for ever; from here on Ray asks for its own


def describe_wait() -> str:
    """Why the workers may be silent, and what the cluster has."""
    cluster = inspect_cluster()
    return (
        f"they are being started or replaced, or wait for data; the cluster has {cluster.describe()}, "
        f"free: {cluster.free.get('CPU', 0):g} CPUs, {cluster.free.get('GPU', 0):g} GPUs"
    )


def count_of(resources: dict[str, float], kind: str) -> str:
    amount = resources.get(kind, 0)
    return f"{amount:g} {kind}{'s' * (amount != 1)}"
