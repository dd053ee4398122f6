"""Check that the cluster's nodes share the local paths of a job.

A node that does not see an input folder would find no files; one that does not see
the output folder would write where nobody looks.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.resources import inspect_cluster
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

_TIMEOUT_SECONDS: Final = 60.0

Paths = dict[str, str]
"""Local path of each flag, such as {"--output": "/data/out"}."""


def check_shared_storage(written: Mapping[str, Location], read: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Compare what the other nodes see at local paths with what this node sees. Nodes that join later are not checked.

    Args:
        written: by flag, the folders that the job writes to.
        read: by flag, one file that the job reads.
        say: writes a console line, about a node that does not answer.

    Raises:
        RequestError: a node does not see one of the paths, or a folder cannot be written.
    """
    files = {flag: location.path for flag, location in read.items() if location.is_local}
    folders = {flag: location.path for flag, location in written.items() if location.is_local}
    if not (files or folders):
        return
    if inspect_cluster().can_grow:
        say(f"nodes that join later must see {' and '.join((files | folders).values())} too; they are not checked")
    others = _other_nodes()
    if not others:
        return
    with _marker_files(folders) as markers:
        probes = files | markers
        answers = {node: _sizes_on_node(node, probes) for node in others}
        expected = _sizes(probes)
        for node, answer in answers.items():
            try:
                sizes = ray.get(answer, timeout=_TIMEOUT_SECONDS)
            except ray.exceptions.GetTimeoutError:
                flags = " and ".join(files | folders)
                say(f"the node {others[node]} did not answer within {_TIMEOUT_SECONDS:.0f} s, so it may not see {flags}")
                continue
            except ray.exceptions.RayError:  # the node has gone, or is about to
                continue
            for flag, path in (files | folders).items():
                if sizes[flag] != expected[flag]:
                    raise RequestError(
                        f"{flag} {path}: the node {others[node]} does not see what this one sees there; name a folder that "
                        "all nodes share, or s3://…"
                    )


def _other_nodes() -> dict[str, str]:
    """Return the address of each living node with CPUs or GPUs, by id, without the node of this process."""
    this_node = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != this_node and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
    }


@contextmanager
def _marker_files(folders: Paths) -> Iterator[Paths]:
    """Keep an empty file in each folder, or in its nearest parent that exists, while the block runs."""
    markers: Paths = {}
    try:
        for flag, folder in folders.items():
            nearest = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
            marker = nearest / f".mnistsum_ray-{secrets.token_hex(8)}"
            try:
                marker.write_bytes(b"")
            except OSError as error:
                raise RequestError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from None
            markers[flag] = str(marker)
        yield markers
    finally:
        for path in markers.values():
            Path(path).unlink(missing_ok=True)


def _sizes_on_node(node: str, paths: Paths) -> ray.ObjectRef:
    # Neither retried nor placed elsewhere: if the node goes, the answer of another one says nothing about it.
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_sizes).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(paths)


def _sizes(paths: Paths) -> dict[str, int | None]:
    """Return the size of each file in bytes, None if it cannot be seen. On a network file system times may differ, sizes not."""
    sizes: dict[str, int | None] = {}
    for key, path in paths.items():
        try:
            sizes[key] = Path(path).stat().st_size
        except OSError:  # it does not exist here, or this node may not read it
            sizes[key] = None
    return sizes
