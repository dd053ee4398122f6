"""Logical resources of the cluster: inspect them, and wait until they are free."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import ray
from ray.autoscaler.sdk import request_resources

from mnistsum_ray.cluster.ray_internals import autoscaler_limits
from mnistsum_ray.errors import RequestError

TASKS_CPU_SHARE: Final = 0.25
"""Smallest share of the CPUs that a job leaves to other tasks. If actors reserved all CPUs, those tasks would never start."""

_NODE_GROUP_LABEL: Final = "ray.io/node-group"
"""Node label that autoscalers (`ray up`, KubeRay) set."""

_MAX_LIMIT: Final = 4096
"""Largest limit of any resource: an autoscaler's configuration may say that there is no limit."""

_POLL_SECONDS: Final = 2.0
_REPORT_SECONDS: Final = 15.0
_EPSILON: Final = 1e-9
"""Ray rounds fractions of a resource to 0.0001, so a smaller difference is a rounding error."""


@dataclass(frozen=True)
class ClusterResources:
    """Logical resources of the cluster at one moment, as dictionaries from kind (CPU, GPU, …) to amount."""

    nodes: tuple[dict[str, float], ...]
    """Total of each node that has CPUs or GPUs."""
    total: dict[str, float]
    free: dict[str, float]
    can_grow: bool
    """An autoscaler may add nodes."""
    limits: dict[str, float] = field(default_factory=dict)
    """Total that the cluster can grow to. Kinds that the autoscaler's configuration does not name are missing."""

    @property
    def gpu_nodes(self) -> tuple[dict[str, float], ...]:
        return tuple(node for node in self.nodes if node.get("GPU"))

    def without_gpus(self) -> "ClusterResources":
        """Return a copy for a job that cannot use the GPUs."""

        def drop_gpus(resources: dict[str, float]) -> dict[str, float]:
            return {kind: amount for kind, amount in resources.items() if kind != "GPU"}

        return replace(
            self,
            nodes=tuple(map(drop_gpus, self.nodes)),
            total=drop_gpus(self.total),
            free=drop_gpus(self.free),
            limits=drop_gpus(self.limits),
        )

    def workers_that_fit(self, bundle: dict[str, float]) -> int:
        """Return how many workers fit on the present nodes if each reserves this bundle on one node."""
        return sum(self.workers_on(node, bundle) for node in self.nodes)

    @staticmethod
    def workers_on(node: dict[str, float], bundle: dict[str, float]) -> int:
        """Return how many workers fit on a node if each reserves this bundle."""
        return min(int(node.get(kind, 0) / amount + _EPSILON) for kind, amount in bundle.items() if amount)

    def describe(self) -> str:
        """Return a text such as `2 CPUs and 0 GPUs on 1 node`."""
        cpus, gpus = (format_resource(self.total, kind) for kind in ("CPU", "GPU"))
        growing = ", and may grow" if self.can_grow else ""
        return f"{cpus} and {gpus} on {len(self.nodes)} node{'s' * (len(self.nodes) != 1)}{growing}"


def inspect_cluster() -> ClusterResources:
    """Return the resources of the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return ClusterResources(
        nodes=tuple(dict(node["Resources"]) for node in alive if any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))),
        total=dict(ray.cluster_resources()),
        free=dict(ray.available_resources()),
        can_grow=any(_NODE_GROUP_LABEL in node["Labels"] for node in alive),
        limits={kind: float(min(amount, _MAX_LIMIT)) for kind, amount in autoscaler_limits().items() if amount},
    )


def wait_until_free(bundles: list[dict[str, float]], seconds: float, say: Callable[[str], None]) -> None:
    """Wait until the resources of all bundles are free. Ray would wait without a limit and without a message.

    Args:
        bundles: resources to wait for; the first bundle has all kinds.
        seconds: longest wait.
        say: writes a console line, every 15 s.

    Raises:
        RequestError: the resources are not free after these seconds.
    """
    need = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in bundles[0]}
    needed = _format_all(need, need)
    started = time.monotonic()
    reported = -_REPORT_SECONDS
    requested = False
    try:
        while True:
            cluster = inspect_cluster()
            if all(cluster.free.get(kind, 0) >= amount - _EPSILON for kind, amount in need.items()):
                return
            waited = time.monotonic() - started
            free = _format_all(cluster.free, need)
            if waited >= seconds:
                raise RequestError(
                    f"needs {needed}, but after {waited:.0f} s only {free} are free ({cluster.describe()}): other jobs hold the "
                    "rest, or the cluster has not grown; ask for fewer --num-workers or give more --wait-seconds"
                )
            if waited - reported >= _REPORT_SECONDS:
                say(f"waiting for {needed}; free now: {free} ({cluster.describe()}); giving up in {seconds - waited:.0f} s")
                reported = waited
                if cluster.can_grow:
                    # Requested again each time: the cluster has one request, and another job's replaces it.
                    request_resources(bundles=bundles)
                    requested = True
            time.sleep(min(_POLL_SECONDS, max(0.1, seconds - waited)))
    finally:
        if requested:
            # A request that stays would hold the nodes for ever. Ray Train and Ray Data make their own.
            request_resources(bundles=[])


def explain_worker_silence() -> str:
    """Return the possible reasons why no worker reports, and the resources of the cluster, for a console line."""
    cluster = inspect_cluster()
    return (
        f"they are being started or replaced, or wait for data; the cluster has {cluster.describe()}, "
        f"free: {cluster.free.get('CPU', 0):g} CPUs, {cluster.free.get('GPU', 0):g} GPUs"
    )


def format_resource(resources: dict[str, float], kind: str) -> str:
    """Return amount and kind, such as `1 CPU` or `0 GPUs`."""
    amount = resources.get(kind, 0)
    return f"{amount:g} {kind}{'s' * (amount != 1)}"


def _format_all(resources: dict[str, float], kinds: Iterable[str]) -> str:
    return " and ".join(format_resource(resources, kind) for kind in kinds)
