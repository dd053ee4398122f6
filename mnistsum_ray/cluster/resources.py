"""Logical resources of the cluster: plan the workers of a job, and wait until they are free."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from ray.autoscaler.sdk import request_resources

from mnistsum_ray.cluster.gpus import REPORT_SECONDS, Gpu, Probe, answers_of, ask_nodes
from mnistsum_ray.cluster.nodes import HEAD, Autoscaler, Resources, autoscaler, usable_nodes
from mnistsum_ray.cluster.ray_internals import free_resources
from mnistsum_ray.errors import RequestError, counted

_TASKS_CPU_SHARE: Final = 0.25
"""Share of the CPUs that workers of a group leave unreserved for the tasks that feed them, which reserve none."""

_NODE_ID_LABEL: Final = "ray.io/node-id"

_MAX_LIMIT: Final = 4096
"""Largest limit of any resource: an autoscaler's may be as good as none."""

_ASSUMED_LIMIT: Final = {"GPU": 16, "CPU": 128}
"""Resources that a growing cluster is assumed to reach if it is not known what its autoscaler may add."""

_MAX_WORKERS_PER_GPU: Final = 8
_WORKER_GPU_BYTES: Final = 4 * 2**30
"""GPU memory of a worker that scores: CUDA's own, and the activations of a batch of 2,048 rows."""
_ASSUMED_GPU_BYTES: Final = 16 * 2**30

_ADVICE: Final = "`ray status`, and on the head /tmp/ray/session_latest/logs/monitor.log, tell why"

_PROBE_SECONDS: Final = 60.0
"""Shortest timeout of a probe: its process on another node has to import PyTorch first."""
_POLL_SECONDS: Final = 2.0
_GRACE_SECONDS: Final = 1.0
"""Time in which Ray counts what was given back, such as the GPU of a probe; no wait is shorter, and this one is silent."""
_EPSILON: Final = 1e-9
"""Ray rounds fractions of a resource to 0.0001, so a smaller difference is a rounding error."""


@dataclass(frozen=True)
class ClusterResources:
    """Logical resources of the cluster at one moment."""

    nodes: tuple[Resources, ...]
    """Total of each node that has CPUs or GPUs."""
    free_nodes: tuple[Resources, ...]
    """Free resources of each of them, in any order."""
    autoscaler: Autoscaler | None = None
    """What may add nodes."""

    @property
    def can_grow(self) -> bool:
        return self.autoscaler is not None

    def total(self, kind: str) -> float:
        return sum(node.get(kind, 0.0) for node in self.nodes)

    def free(self, *kinds: str) -> Resources:
        """Free amount of each kind on all nodes together."""
        return {kind: sum(node.get(kind, 0.0) for node in self.free_nodes) for kind in kinds}

    def limit(self, kind: str, *, spare_gpus: bool = False) -> float:
        """Amount that the cluster can grow to, with `spare_gpus` by nodes without GPUs alone; infinite if that is not known."""
        if self.autoscaler is None or (spare_gpus and not self.autoscaler.node_types):
            return self.total(kind)
        if not self.autoscaler.node_types:
            return math.inf
        kinds = [(node, count) for node, count in self.autoscaler.node_types if not (spare_gpus and node.get("GPU"))]
        head = sum(node.get(kind, 0.0) for node in self.nodes if HEAD in node)
        return max(self.total(kind), min(_MAX_LIMIT, head + sum(node.get(kind, 0.0) * count for node, count in kinds)))

    def cpus_per_gpu(self) -> float:
        """CPUs for each GPU on the node with the fewest, since those of other nodes are of no use; infinite without GPUs."""
        return min((node.get("CPU", 0.0) / node["GPU"] for node in self.nodes if node.get("GPU")), default=math.inf)

    def workers_that_fit(self, bundle: Resources) -> int:
        """Number of workers that fit on the present nodes if each reserves this bundle on one node."""
        return sum(self.workers_on(node, bundle) for node in self.nodes)

    def workers_that_fit_now(self, bundle: Resources) -> int:
        """The same, on what is free."""
        return sum(self.workers_on(node, bundle) for node in self.free_nodes)

    @staticmethod
    def workers_on(node: Resources, bundle: Resources) -> int:
        """Number of workers that fit on one node."""
        return min(int(node.get(kind, 0) / amount + _EPSILON) for kind, amount in bundle.items() if amount)

    def __str__(self) -> str:
        """A text such as `2 CPUs and 0 GPUs on 1 node`, and what an autoscaler can make of it."""
        total, limits = (_format({kind: get(kind) for kind in ("CPU", "GPU")}) for get in (self.total, self.limit))
        growth = ", and may grow" if self.autoscaler else ""
        if self.autoscaler and self.autoscaler.node_types:
            growth += f" to {limits}, as its autoscaler ({self.autoscaler.version}) is configured"
        return f"{total} on {counted(len(self.nodes), 'node')}{growth}"


@dataclass(frozen=True)
class WorkerRequest:
    """Workers that a job asks for."""

    workers: tuple[int, int] | None
    """Minimum and maximum number; None: as many as are of use."""
    use_gpu: bool | None
    """None: on GPUs if the cluster has any that PyTorch can use, and one is free."""
    wait_seconds: float
    """Longest wait for resources."""
    group: bool = False
    """Workers that train together: the minimum of them starts at once, each with a GPU of its own, or one a node on CPUs, and
    they leave CPUs to the tasks that feed them. Otherwise a pool of workers that need no others: one is enough to start, several
    share a GPU, on CPUs there is one a core, and nodes that join later get workers too."""
    useful_gpus: int = 1
    """Number of GPUs above which a group is not faster."""


@dataclass(frozen=True)
class WorkerPlan:
    """Workers of a job and what each of them reserves."""

    worker_range: tuple[int, int]
    """Minimum and maximum number. Fewer than the maximum run where fewer resources are free."""
    needed: int
    """Number of workers that have to fit for the job to start."""
    per_worker: Resources
    """What each reserves on one node: 1 / k GPU where k share one, which predicts for one while the others read and write."""
    gpu: Gpu | None = None
    """None for a job on CPUs."""
    label_selector: dict[str, str] | None = None
    """Nodes that workers may run on, as Ray takes it; None: all."""
    may_grow: bool = False
    """An autoscaler may add nodes for them."""

    @property
    def workers(self) -> int:
        """Maximum number of workers at the same time."""
        return self.worker_range[1]

    @property
    def use_gpu(self) -> bool:
        return "GPU" in self.per_worker

    def describe(self) -> str:
        """A text such as `1 CPU worker` or `2 to 4 GPU workers`."""
        low, high = self.worker_range
        number = str(low) if low == high else f"{low} to {high}"
        return f"{number} {'GPU' if self.use_gpu else 'CPU'} worker{'' if high == 1 else 's'}"


_ONE_GPU: Final = WorkerPlan((1, 1), needed=1, per_worker={"GPU": 1.0})


def reserve(request: WorkerRequest, say: Callable[[str], None], probe: Probe | None = None) -> WorkerPlan:
    """Plan the workers of a job by what it asks for and by what the cluster has, and wait until enough of them fit.

    Ray counts a GPU on every Mac with Apple silicon, and NVIDIA's by their driver, whichever build of PyTorch is installed. So
    PyTorch is tried on each node that has one; `probe` is a trial that was begun with `begin_probe`. Where MIG is on, Ray counts
    whole cards, and CUDA shows one instance of each: the others need a `ray start` with their names in CUDA_VISIBLE_DEVICES and
    their number in --num-gpus.

    Raises:
        RequestError: the cluster can never give what is asked for, or does not give it within `wait_seconds`.
    """
    cluster = inspect_cluster()
    gpu: Gpu | None = None
    avoided: list[str] = []
    unusable = False
    if cluster.total("GPU") >= 1 and request.use_gpu is not False:
        gpu, avoided = _probe_gpus(request, say, probe)
        unusable, cluster = gpu is None, inspect_cluster(avoided)
    elif cluster.limit("GPU") >= 1 and request.use_gpu is None:
        say(f"running on CPUs, since the cluster has {cluster}; --use-gpu true waits for GPUs")
    plan, gpus = plan_workers(request, cluster, gpu, unusable=unusable), int(cluster.total("GPU"))
    if plan.use_gpu and request.workers is None and plan.workers < gpus and not (gpu and gpu.mig):
        say(f"running on {plan.workers} of {gpus} GPUs: with so small a batch more are no faster; --num-workers {gpus} takes all")
    wait_until_free(plan, request.wait_seconds, say, avoided)
    if plan.use_gpu and gpu is None:  # an autoscaler has started the nodes with GPUs meanwhile
        gpu, avoided = _probe_gpus(request, say)
    if not avoided:
        return replace(plan, gpu=gpu)
    low, high = plan.worker_range
    if not cluster.can_grow:  # Ray Train counts the GPUs of all nodes, and would wait for workers that cannot run there
        high = max(low, min(high, cluster.workers_that_fit(plan.per_worker)))
    return replace(plan, worker_range=(low, high), gpu=gpu, label_selector={_NODE_ID_LABEL: f"!in({','.join(avoided)})"})


def plan_workers(
    request: WorkerRequest, cluster: ClusterResources, gpu: Gpu | None = None, *, unusable: bool = False
) -> WorkerPlan:
    """Choose workers and devices: as requested, and where the request is silent by what the cluster has.

    `gpu` is None if no GPU has been asked, or if those of the cluster are `unusable`.

    Raises:
        RequestError: the request asks for more than the cluster can ever have.
    """
    gpus = int(cluster.total("GPU"))
    use_gpu = gpus > 0 and not unusable if request.use_gpu is None else request.use_gpu
    if use_gpu and cluster.limit("GPU") < 1:
        raise RequestError(f"--use-gpu true: the cluster has no GPU ({cluster})")
    kind = "GPU" if use_gpu else "CPU"
    # Work on CPUs does not start nodes with GPUs for their CPUs, unless CPUs are requested.
    limit = cluster.limit(kind, spare_gpus=request.use_gpu is None and not use_gpu)
    sharing = 1
    if request.group:
        default = max(1, min(gpus, 1 if gpu and gpu.mig else request.useful_gpus) if use_gpu else len(cluster.nodes))
        low, high = request.workers or (default, default)
        if gpu and gpu.mig and high > 1:
            raise RequestError(
                f"--num-workers {high}: the GPUs are instances of cards with MIG on, of which a process sees one; a training has "
                "--num-workers 1 there"
            )
    else:
        # Until the cluster has grown to it fewer workers run.
        largest = max(1, int(limit if limit < math.inf else max(cluster.total(kind), _ASSUMED_LIMIT[kind])))
        memory = gpu.memory_bytes if gpu else _ASSUMED_GPU_BYTES
        low, high = request.workers or (largest * (workers_per_gpu(memory, cluster.cpus_per_gpu()) if use_gpu else 1),) * 2
        sharing = -(-high // largest) if use_gpu else 1
    if low >= sharing * limit + 1:  # a part of a CPU is enough for a worker
        need = f"needs {_format({kind: low})}, one a worker; the cluster has {cluster}"
        choice = "; --use-gpu true takes nodes with GPUs, and --use-gpu false the CPUs of any"
        raise RequestError(f"--num-workers {low}: {need}{choice if limit < cluster.limit(kind) else ''}")
    if use_gpu:
        cpus = cluster.cpus_per_gpu() / sharing
    elif cluster.can_grow:
        cpus = math.inf  # nodes that an autoscaler adds bring their own
    else:
        cpus = cluster.total("CPU") / max(1, min(high, int(cluster.total("CPU"))))
    cpus = min(1.0, cpus * (1 - _TASKS_CPU_SHARE if request.group else 1))
    per_worker = {"CPU": cpus} | ({"GPU": 1 / sharing} if use_gpu else {})
    plan = WorkerPlan((low, high), low if request.group else 1, per_worker, may_grow=limit > cluster.total(kind))
    fitting = cluster.workers_that_fit(plan.per_worker)
    if plan.needed > fitting and not cluster.can_grow:
        each = _format(plan.per_worker)
        raise RequestError(f"--num-workers {low}: only {fitting} of them, with {each} each, fit on the nodes ({cluster})")
    return plan


def workers_per_gpu(memory_bytes: int, cpus: float) -> int:
    """Workers of a pool that share a GPU: as many as its memory, and the CPUs of its node for each GPU, allow."""
    return max(1, int(min(_MAX_WORKERS_PER_GPU, cpus, memory_bytes // _WORKER_GPU_BYTES)))


def inspect_cluster(without: Collection[str] = ()) -> ClusterResources:
    """Resources of the cluster that this process is connected to, but for those of the nodes with some ids."""
    return ClusterResources(
        nodes=tuple(node["Resources"] for node in usable_nodes() if node["NodeID"] not in without),
        free_nodes=tuple(free for node, free in free_resources().items() if node not in without),
        autoscaler=autoscaler(),
    )


def explain_worker_silence() -> str:
    """Possible reasons why no worker reports, and the resources of the cluster, for a console line."""
    cluster = inspect_cluster()
    free = _format(cluster.free("CPU", "GPU"))
    return f"they are being started or replaced, or wait for data; the cluster has {cluster}, free: {free}"


def wait_until_free(plan: WorkerPlan, seconds: float, say: Callable[[str], None], without: Collection[str] = ()) -> None:
    """Wait until the workers fit on what is free, but for some nodes. Ray would wait without a limit and without a message.

    A placement group would hold them, but Ray takes up to a second to count what it gives back, and the job's own would wait.

    Raises:
        RequestError: they do not fit after these seconds.
    """
    bundle, count = {kind: amount for kind, amount in plan.per_worker.items() if amount}, plan.needed
    need = _format({kind: amount * count for kind, amount in bundle.items()})
    need += f" ({_format(bundle)} on one node each)" if count > 1 else ""
    started, since = time.monotonic(), time.strftime("%H:%M:%S")
    next_report = _GRACE_SECONDS
    requested = False
    try:
        while (cluster := inspect_cluster(without)).workers_that_fit_now(bundle) < count:
            free, waited = _format(cluster.free(*bundle)), time.monotonic() - started
            if waited >= max(seconds, _GRACE_SECONDS):
                raise RequestError(
                    f"needs {need}, but after {waited:.0f} s only {free} are free ({cluster}): other jobs hold the rest, or the "
                    f"cluster has not grown; {_ADVICE}; ask for fewer --num-workers or give more --wait-seconds"
                )
            if waited >= next_report:
                times = f"asked for since {since}, giving up in {seconds - waited:.0f} s"
                say(f"waiting for {need}; free now: {free} ({cluster}); {times}; {_ADVICE}")
                next_report = waited + REPORT_SECONDS
                if plan.may_grow:
                    # Requested again each time: the cluster has one request, and another job's replaces it.
                    request_resources(bundles=[bundle] * count)
                    requested = True
            time.sleep(0.05 if waited < _GRACE_SECONDS else min(_POLL_SECONDS, max(0.1, seconds - waited)))
    finally:
        if requested:
            # A request that stays would hold the nodes for ever. Ray Train and Ray Data make their own.
            request_resources(bundles=[])


def _probe_gpus(request: WorkerRequest, say: Callable[[str], None], probe: Probe | None = None) -> tuple[Gpu | None, list[str]]:
    """The least that the GPUs that answered can do, and the ids of nodes whose GPUs PyTorch cannot use, with a console line each.

    None, with a console line, if no GPU is requested and PyTorch can use none, or other jobs hold them: those are waited for only
    where a GPU is requested.

    Raises:
        RequestError: GPUs are requested, and PyTorch cannot use them, or none was free in time, or the node was lost.
    """
    if not probe:
        try:
            wait_until_free(_ONE_GPU, request.wait_seconds if request.use_gpu else 0.0, say)
        except RequestError:
            if request.use_gpu:
                raise
            say(f"running on CPUs: other jobs hold the GPUs ({inspect_cluster()}); --use-gpu true waits for one")
            return None, []
    seconds = max(_PROBE_SECONDS, request.wait_seconds)
    answers = answers_of(probe or ask_nodes(), seconds, say)
    found = [gpu for _, gpu in answers if isinstance(gpu, Gpu)]
    problems = [(node, text) for node, text in answers if isinstance(text, str)]
    if found:
        for node, text in problems:
            say(f"the GPUs of node {node['NodeManagerAddress']} are not used: {text}")
        gpu = Gpu(all(one.bf16 for one in found), min(one.memory_bytes for one in found), any(one.mig for one in found))
        return gpu, [node["NodeID"] for node, _ in problems]
    problem = f"no GPU has answered for {seconds:.0f} s: other jobs hold them, or PyTorch takes longer to be imported there"
    advice = "wait, or give more --wait-seconds"
    if problems:
        node, text = problems[0]
        where = f", but on node {node['NodeManagerAddress']} " if len(problems) > 1 else ", but "
        problem = f"Ray counts {_format({'GPU': inspect_cluster().total('GPU')})}{where}{text}"
        build = "PyTorch needs a CUDA build that fits card and driver there (the default one: driver 580)"
        advice = "see Ray's logs" if "could not be asked" in text else build
    if request.use_gpu:
        raise RequestError(f"--use-gpu true: {problem}; {advice}, or leave --use-gpu out")
    say(f"running on CPUs: {problem}")
    return None, []


def _format(resources: Resources) -> str:
    """Amounts and kinds, such as `1 CPU and 0 GPUs`."""
    return " and ".join(f"{amount:g} {kind}{'' if amount == 1 else 's'}" for kind, amount in resources.items())
