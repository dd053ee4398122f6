"""The rows of a run: read and decoded once, by tasks, into blocks in Ray's object store.

Neither Ray Data, Ray Train nor PyTorch is imported here: processes that only need rows start a
second sooner.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import ray.exceptions

from mnistsum_ray.cluster.nodes import usable_nodes
from mnistsum_ray.data.images import PIXELS, SIDE, Pixels
from mnistsum_ray.data.randomness import RowIds, TrainingOrder
from mnistsum_ray.data.sources import BadRows, Block, Digits, FileGroup, Groups, Source
from mnistsum_ray.errors import RequestError, RowCountError, RunError, counted

_ROW_BYTES: Final = PIXELS + 1
"""Memory of a row in a block: pixels and digit."""

_USABLE_SHARE: Final = 0.8
"""Share of an object store that a run may plan to fill: Ray spills to disk above that."""

_RETRIES: Final = 3
"""Processes that Ray starts again for the same rows."""

_Summary = tuple[int, BadRows, bytes]
"""What the driver learns of a block: its rows, the bad ones, and the SHA-256 of its content."""

_LoadedBlocks = Iterator[tuple[_Summary, "ray.ObjectRef[tuple[Pixels, Digits]]"]]
"""Blocks in the object store, with their summaries, in the order of the rows."""


@dataclass(frozen=True)
class RowBlocks:
    """All rows, decoded, in the object store, which spills to disk what it has no memory for."""

    refs: list["ray.ObjectRef[tuple[Pixels, Digits]]"]
    bounds: RowIds
    """Block i holds the row ids bounds[i]..bounds[i + 1] - 1."""

    def fetch(self, ids: RowIds) -> tuple[Pixels, Digits]:
        """Copy rows int64[n], in any order, as uint8[n, 28, 28] and int8[n].

        Their blocks are asked for one by one, so that spilled ones do not all come back at once.
        """
        images = np.empty((len(ids), SIDE, SIDE), np.uint8)
        digits = np.empty(len(ids), np.int8)
        order = np.argsort(ids, kind="stable")
        edges = np.searchsorted(ids[order], self.bounds)
        for block in np.flatnonzero(np.diff(edges)):
            # Where the rows of this block stand in `ids`.
            places = order[edges[block] : edges[block + 1]]
            rows = ids[places] - self.bounds[block]
            block_images, block_digits = ray.get(self.refs[block])
            images[places] = block_images[rows]
            digits[places] = block_digits[rows]
        return images, digits


@dataclass(frozen=True)
class TrainingData:
    """What every worker and every reader knows of the rows."""

    blocks: RowBlocks
    order: TrainingOrder
    validation: RowIds
    test: RowIds


def check_space(rows: int) -> str:
    """Check that the object stores of the cluster hold the rows, and the disk what they do not.

    Returns:
        The console line that says so.

    Raises:
        RequestError: the disk cannot hold what Ray would spill to it.
    """
    nodes = usable_nodes()
    stores = sum(node["Resources"].get("object_store_memory", 0.0) for node in nodes)
    needed = rows * _ROW_BYTES
    spilled = needed - _USABLE_SHARE * stores
    there = f"{_mebibytes(needed)}, and the object stores have {_mebibytes(stores)}"
    line = f"reading {counted(rows, 'row')}: {there}"
    if spilled <= 0:
        return line
    # Ray spills into the folder of its session. Other nodes are taken to have as much room.
    here = ray.get_runtime_context().get_node_id()
    session = next(node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here)
    free = len(nodes) * shutil.disk_usage(Path(session).parent).free
    if spilled > free:
        raise RequestError(
            f"--data: {line}; Ray would spill {_mebibytes(spilled)} to disk, where "
            f"{_mebibytes(free)} are free; start Ray with a larger --object-store-memory, or "
            "RAY_TMPDIR on a larger disk"
        )
    return f"{line}; Ray spills the rest to disk, where {_mebibytes(free)} are free"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def load_blocks(
    source: Source, *, skip_bad_rows: bool, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[Source, RowBlocks, str]:
    """Read and decode all rows into the object store, file by file, by tasks.

    `on_progress` gets numbers of rows that have been read.

    Returns:
        The source without bad rows, the blocks, and a SHA-256 of their content and of the splits.

    Raises:
        RequestError: a file or a row cannot be used, or too few rows can.
        RunError: the storage does not give a file, or the process that reads it dies repeatedly.
        RowCountError: a file holds more or fewer rows than its footer says.
    """
    refs = []
    bounds = [0]
    bad: BadRows = {}
    digest = hashlib.sha256()
    for (rows, bad_rows, sha256), ref in _read_groups(source.groups):
        bad |= {bounds[-1] + row: place for row, place in bad_rows.items()}
        refs.append(ref)
        bounds.append(bounds[-1] + rows)
        digest.update(sha256)
        on_progress(rows)
    if bounds[-1] != source.rows:
        problem = f"read {bounds[-1]:,} rows of files that hold {source.rows:,}"
        raise RowCountError(f"--data {source.location}: {problem}")
    if not skip_bad_rows:
        source.refuse(bad)
    good = source.without(bad)
    for split in (good.train, good.validation, good.test):
        digest.update(f"{len(split)} rows".encode() + split.tobytes())
    return good, RowBlocks(refs, np.array(bounds)), digest.hexdigest()


def _summary(block: Block) -> _Summary:
    digest = hashlib.sha256(block.images.tobytes())
    digest.update(block.digits.tobytes())
    return len(block.digits), block.bad, digest.digest()


def _read_groups(groups: Groups) -> _LoadedBlocks:
    """Load all groups, several at a time; errors are those of `load_blocks`."""
    # No CPU is reserved, so that busy workers of another job cannot hold these tasks up.
    options = {"num_cpus": 0, "max_retries": _RETRIES, "num_returns": "streaming"}
    read = ray.remote(**options)(_read_group)
    most = max(1, int(ray.cluster_resources().get("CPU", 1)))
    loading: deque[_LoadedBlocks] = deque()
    for group in groups:
        if isinstance(group, Block):
            loading.append(_put_blocks(group))
        else:
            loading.append(_blocks_of_task(read.remote(group)))
        if len(loading) >= most:
            yield from loading.popleft()
    for blocks in loading:
        yield from blocks


def _put_blocks(rows: Block) -> _LoadedBlocks:
    """Put rows that are in memory into the object store."""
    for block in rows.blocks():
        yield _summary(block), ray.put((block.images, block.digits))


def _read_group(group: FileGroup) -> Iterator[_Summary | tuple[Pixels, Digits]]:
    """A task: of each block its summary, which the driver gets, then its rows, which stay there."""
    for block in group.blocks():
        yield _summary(block)
        yield block.images, block.digits


def _blocks_of_task(objects: Any) -> _LoadedBlocks:
    """The blocks of a task of `_read_group`, of the references to its objects."""
    try:
        for reference in objects:
            summary = ray.get(reference)  # first: after an error no rows follow
            yield summary, next(objects)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RequestError | RowCountError):
            raise error.cause from None
        raise RunError(f"--data {error.cause}; nothing was begun") from error
