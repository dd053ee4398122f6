"""Check that the cluster's nodes share the local paths of a job: another node would read nothing, or write where nobody looks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import ray
import ray.exceptions

from mnistsum_ray.cluster.nodes import on_node, usable_nodes
from mnistsum_ray.cluster.resources import inspect_cluster
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock import LOCK_NAME

_TIMEOUT_SECONDS: Final = 60.0

_COMPARED_BYTES: Final = 4096

Seen = dict[str, tuple[int, bytes] | None]
"""By flag, the size of a file and its first bytes; None if it cannot be seen. On a network file system times may differ."""


def check_shared_storage(written: Mapping[str, OutputFolder], read: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Compare what the other nodes see at local paths with what this node sees. Nodes that join later are not checked.

    The paths are given by flag: folders that the job holds, which have its lock, and one file of each that it reads.

    Raises:
        RequestError: a node does not see one of the paths.
    """
    paths = {flag: place.path for flag, place in read.items() if place.is_local}
    folders = {flag: held.place.path for flag, held in written.items() if held.place.is_local}
    if not paths | folders:
        return
    if inspect_cluster().can_grow:
        say(f"nodes that join later must see {' and '.join((paths | folders).values())} too; they are not checked")
    files = paths | {flag: f"{path}/{LOCK_NAME}" for flag, path in folders.items()}
    this_node = ray.get_runtime_context().get_node_id()
    # Neither retried nor placed elsewhere: if the node goes, the answer of another one says nothing about it.
    look, others = ray.remote(max_retries=0)(_look), [node for node in usable_nodes() if node["NodeID"] != this_node]
    answers = [(node["NodeManagerAddress"], look.options(**on_node(node["NodeID"])).remote(files)) for node in others]
    expected = _look(files)
    for address, answer in answers:
        try:
            seen = ray.get(answer, timeout=_TIMEOUT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            say(f"the node {address} did not answer within {_TIMEOUT_SECONDS:.0f} s, so it may not see {' and '.join(files)}")
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
