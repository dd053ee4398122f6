"""Whether every node sees what a run names by a local path: one that does not would read nothing, or write where nobody looks."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

_ANSWER_SECONDS: Final = 60.0


def check_shared_storage(written: Mapping[str, Location], read: Mapping[str, Location], say: Callable[[str], None]) -> None:
    """Compare what other nodes see with what this one sees; nodes that join later are not asked.

    Args:
        written: by flag, the folders that are written to.
        read: by flag, a file that is read; where it lies on another storage than a disk, nothing has to be asked.
        say: is told of a node that does not answer.

    Raises:
        RequestError: a node does not see one of them.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
    }
    files = {flag: place.path for flag, place in read.items() if place.is_local}
    folders = {flag: place.path for flag, place in written.items() if place.is_local}
    if not others or not (files or folders):
        return
    with _marked(folders) as marks:
        probes = files | marks
        asked = {
            # Placed on a node that goes meanwhile, it is not tried elsewhere, where it would say nothing about that one.
            node: ray.remote(_sizes).options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            )
            for node in others
        }
        answers = {node: task.remote(probes) for node, task in asked.items()}
        mine = _sizes(probes)
        for node, answer in answers.items():
            try:
                theirs = ray.get(answer, timeout=_ANSWER_SECONDS)
            except ray.exceptions.GetTimeoutError:
                say(f"the node {others[node]} has not said in {_ANSWER_SECONDS:.0f} s whether it sees what this one sees")
                continue
            except ray.exceptions.RayError:  # it has gone, or is about to
                continue
            for flag, path in (files | folders).items():
                if theirs[flag] != mine[flag]:
                    raise RequestError(
                        f"{flag} {path}: the node {others[node]} does not see what this one sees there; name a folder that "
                        "all nodes share, or s3://…"
                    )


@contextmanager
def _marked(folders: dict[str, str]) -> Iterator[dict[str, str]]:
    """A file of ours in each folder, or in the nearest one above that is there, for as long as the block runs."""
    marks: dict[str, str] = {}
    try:
        for flag, folder in folders.items():
            nearest = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
            mark = nearest / f".mnistsum_ray-{secrets.token_hex(8)}"
            try:
                mark.write_bytes(b"")
            except OSError as error:
                raise RequestError(f"{flag} {folder}: cannot be written ({error.strerror or error})") from None
            marks[flag] = str(mark)
        yield marks
    finally:
        for path in marks.values():
            Path(path).unlink(missing_ok=True)


def _sizes(paths: dict[str, str]) -> dict[str, int | None]:
    """Of each file, or None where there is none. Clocks and caches of a network's file system may differ about its time."""
    return {key: Path(path).stat().st_size if Path(path).exists() else None for key, path in paths.items()}
