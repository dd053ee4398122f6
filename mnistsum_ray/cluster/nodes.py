"""Nodes of the cluster: options of what runs on them, and the paths that they see."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.store import Location

Resources = dict[str, float]
"""From kind (CPU, GPU, …) to amount."""

_LOOK_SECONDS: Final = 60.0
"""Longest wait for a node that looks at local paths."""


def on_node(node: str | None = None) -> dict[str, Any]:
    """Options of a task or actor that reserves nothing, on this node or the one of this id."""
    node = node or ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy}


def usable_nodes() -> list[dict[str, Any]]:
    """Ray's entry of each living node that has CPUs or GPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if {"CPU", "GPU"} & node["Resources"].keys()]


def set_data_options(
    dataset: Any,
    *,
    preserve_order: bool,
    object_store_bytes: int | None = None,
    block_bytes: int | None = None,
) -> None:
    """Set options of a Ray Dataset of this program, and of those that are derived from it.

    No task is started while blocks of `object_store_bytes` wait for the consumer; None: half of
    the store. What a task yields is passed on once it has `block_bytes`.
    """
    context = dataset.context
    # The jobs report progress themselves; Ray's bars and plans would repeat it.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    options = context.execution_options
    options.preserve_order = preserve_order
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    if object_store_bytes is not None:
        limits = options.resource_limits.copy(object_store_memory=object_store_bytes)
        options.resource_limits = limits


def check_shared_storage(files: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Check that other nodes see the same local files as this one: they might write there.

    There is one for each flag: a file that the job reads, or that it has written to its output.

    Raises:
        RequestError: a node does not see one of the files.
    """
    paths = {flag: file.path for flag, file in files.items() if file.is_local}
    if not paths:
        return
    here, expected = ray.get_runtime_context().get_node_id(), _first_bytes(paths)
    # Neither retried nor placed elsewhere: an answer of another node says nothing about this one.
    look = ray.remote(max_retries=0)(_first_bytes)
    answers = {}
    for node in usable_nodes():
        if node["NodeID"] != here:
            answer = look.options(**on_node(node["NodeID"])).remote(paths)
            answers[node["NodeManagerAddress"]] = answer
    for address, answer in answers.items():
        try:
            seen = ray.get(answer, timeout=_LOOK_SECONDS)
        except ray.exceptions.RayError:  # it is busy, has gone, or is about to
            say(f"the node {address} does not answer, so it may not see {' and '.join(paths)}")
            continue
        for flag, path in paths.items():
            if seen[flag] != expected[flag]:
                raise RequestError(
                    f"{flag} {path}: the node {address} does not see what this one sees there; "
                    "name a folder that all nodes share, or s3://…"
                )


def _first_bytes(files: dict[str, str]) -> dict[str, bytes | None]:
    """First bytes of each file; None where this node cannot read it."""
    seen: dict[str, bytes | None] = {}
    for flag, path in files.items():
        seen[flag] = None
        with suppress(OSError), Path(path).open("rb") as file:
            seen[flag] = file.read(4096)
    return seen
