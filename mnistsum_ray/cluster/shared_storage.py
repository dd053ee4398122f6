"""Check that the cluster's nodes share the local paths of a job.

A node that does not see an input folder would find no files; one that does not see the output folder would write where nobody
looks.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.cluster.resources import inspect_cluster, usable_nodes
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

_TIMEOUT_SECONDS: Final = 60.0


def check_shared_storage(written: Mapping[str, Location], read: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Compare what the other nodes see at local paths with what this node sees. Nodes that join later are not checked.

    Args:
        written: by flag, the folders that the job writes to.
        read: by flag, one file that the job reads.
        say: writes a console line, about a node that does not answer.

    Raises:
        RequestError: a node does not see one of the paths, or a folder cannot be written.
    """
    paths = {flag: location.path for flag, location in {**read, **written}.items() if location.is_local}
    if not paths:
        return
    if inspect_cluster().can_grow:
        say(f"nodes that join later must see {' and '.join(paths.values())} too; they are not checked")
    this_node = ray.get_runtime_context().get_node_id()
    others = [node for node in usable_nodes() if node["NodeID"] != this_node]
    if not others:
        return
    with ExitStack() as markers:
        probes = {flag: _marker(flag, path, markers) if flag in written else path for flag, path in paths.items()}
        answers = [_sizes_on_node(node["NodeID"], probes) for node in others]
        expected = _sizes(probes)
        for address, answer in zip((node["NodeManagerAddress"] for node in others), answers, strict=True):
            try:
                sizes = ray.get(answer, timeout=_TIMEOUT_SECONDS)
            except ray.exceptions.GetTimeoutError:
                say(f"the node {address} did not answer within {_TIMEOUT_SECONDS:.0f} s, so it may not see {' and '.join(paths)}")
                continue
            except ray.exceptions.RayError:  # the node has gone, or is about to
                continue
            for flag, path in paths.items():
                if sizes[flag] != expected[flag]:
                    raise RequestError(
                        f"{flag} {path}: the node {address} does not see what this one sees there; name a folder that "
                        "all nodes share, or s3://…"
                    )


def _marker(flag: str, folder: str, markers: ExitStack) -> str:
    """Path of an empty file in a folder, or in its nearest parent that exists, until `markers` is closed."""
    nearest = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
    try:
        return markers.enter_context(NamedTemporaryFile(prefix=".mnistsum_ray-", dir=nearest)).name
    except OSError as error:
        raise RequestError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from None


def _sizes_on_node(node: str, paths: dict[str, str]) -> ray.ObjectRef:
    # Neither retried nor placed elsewhere: if the node goes, the answer of another one says nothing about it.
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_sizes).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(paths)


def _sizes(paths: dict[str, str]) -> dict[str, int | None]:
    """Return the size of each file in bytes, None if it cannot be seen. On a network file system times may differ, sizes not."""
    sizes: dict[str, int | None] = {}
    for flag, path in paths.items():
        try:
            sizes[flag] = Path(path).stat().st_size
        except OSError:  # it does not exist here, or this node may not read it
            sizes[flag] = None
    return sizes
