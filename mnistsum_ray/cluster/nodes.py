"""Nodes of the cluster: run something on one, find lost ones, compare the paths that they see."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.connection import can_connect
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import LOCK_NAME

Resources = dict[str, float]
"""From kind (CPU, GPU, …) to amount."""

_LOOK_SECONDS: Final = 60.0
"""Longest wait for a node that looks at local paths."""

_COMPARED_BYTES: Final = 4096

Seen = dict[str, tuple[int, bytes] | None]
"""By flag, the size of a file and its first bytes; None if it cannot be seen. On a network file system times may differ."""


def this_node() -> Resources:
    """Total resources of the node of this process."""
    node_id = ray.get_runtime_context().get_node_id()
    return next((dict(node["Resources"]) for node in ray.nodes() if node["NodeID"] == node_id), {})


def on_node(node: str | None = None) -> dict[str, Any]:
    """Options of a task or actor that reserves nothing and runs on one node alone: the one of this id, or of this process."""
    strategy = NodeAffinitySchedulingStrategy(node or ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def usable_nodes() -> list[dict[str, Any]]:
    """Ray's entry of each living node that has CPUs or GPUs."""
    return [node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))]


def lost_nodes(drained: Collection[str] = ()) -> dict[str, str]:
    """Address by id of each node that the cluster has lost, or is about to lose. Ray itself notices a loss after the workers on
    other nodes have failed."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if not node["Alive"] or node["NodeID"] in drained or not can_connect(node["NodeManagerAddress"], node["NodeManagerPort"])
    }


def check_shared_storage(written: Mapping[str, OutputFolder], read: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Compare what the other nodes see at local paths with what this node sees: they might write where nobody looks.

    The paths are given by flag: folders that the job holds, which have its lock, and one file of each that it reads.

    Raises:
        RequestError: a node does not see one of the paths.
    """
    paths = {flag: place.path for flag, place in read.items() if place.is_local}
    folders = {flag: held.place.path for flag, held in written.items() if held.place.is_local}
    if not paths | folders:
        return
    files = paths | {flag: f"{path}/{LOCK_NAME}" for flag, path in folders.items()}
    here = ray.get_runtime_context().get_node_id()
    # Neither retried nor placed elsewhere: if the node goes, the answer of another one says nothing about it.
    look, others = ray.remote(max_retries=0)(_look), [node for node in usable_nodes() if node["NodeID"] != here]
    answers = [(node["NodeManagerAddress"], look.options(**on_node(node["NodeID"])).remote(files)) for node in others]
    expected = _look(files)
    for address, answer in answers:
        try:
            seen = ray.get(answer, timeout=_LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError:
            say(f"the node {address} did not answer within {_LOOK_SECONDS:.0f} s, so it may not see {' and '.join(files)}")
            continue
        except ray.exceptions.RayError:  # the node has gone, or is about to
            continue
        for flag, path in (paths | folders).items():
            if seen[flag] != expected[flag]:
                raise RequestError(
                    f"{flag} {path}: the node {address} does not see what this one sees there; name a folder that "
                    "all nodes share, or s3://…"
                )


def _look(files: dict[str, str]) -> Seen:
    seen: Seen = {}
    for flag, path in files.items():
        try:
            with Path(path).open("rb") as file:
                seen[flag] = Path(path).stat().st_size, file.read(_COMPARED_BYTES)
        except OSError:  # it does not exist here, or this node may not read it
            seen[flag] = None
    return seen
