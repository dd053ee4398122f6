"""Tasks on the cluster: options of Ray Data for them, the number of their crashes, and a function that is mapped over many files.

Ray takes a second to import. Few files need no cluster, and a request that is refused early neither, so the functions import it.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.errors import RunError
from mnistsum_ray.storage.location import Location

MAX_CRASHES: Final = 3
"""Processes that may die in the same work before it is given up: Ray alone would start new ones for ever."""

CAUSES: Final = "out of memory? Ray's logs may tell"

MAX_LOCAL_FILES: Final = 64
"""Up to this number, this process is done before tasks would have started."""

_FILES_PER_TASK: Final = 500
_THREADS: Final = 16

_CONTEXT_LOCK: Final = threading.RLock()
"""The current DataContext belongs to the process and not to a thread, and datasets are created in several threads."""

ReadFiles = Callable[[Location, pa.Table], pa.Table]
"""Takes a folder and a table of files in it with the columns `name` and `size`; returns one row per file, in the same order."""


@contextmanager
def ray_data_options(*, preserve_order: bool, object_store_bytes: int | None = None) -> Iterator[None]:
    """Set options for the datasets that are created in the block; those of the user keep theirs.

    A generator must not yield inside. No task is started, and the execution sleeps, while blocks of
    `object_store_bytes` wait for the consumer; None: half of the store.
    """
    from ray.data import DataContext

    from mnistsum_ray.cluster.workarounds import PatientExecution

    with _CONTEXT_LOCK:
        context = DataContext.get_current().copy()
        # The app reports progress itself; Ray's bars and plans would repeat it.
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = preserve_order
        if object_store_bytes is not None:
            context.custom_execution_callback_classes += [PatientExecution]
            options = context.execution_options
            limits = options.resource_limits.copy(object_store_memory=object_store_bytes)
            options.resource_limits = limits
        with DataContext.current(context):
            yield


class CrashCounter:
    """Counts how often each key was begun and not ended; an actor, since who began may have died."""

    def __init__(self) -> None:
        self._nodes: dict[str, list[str]] = defaultdict(list)
        """Of the attempts of each key."""

    def begin(self, key: str, node: str) -> int:
        """Count an attempt; return how many have not ended, save those whose node was lost."""
        import ray

        if nodes := self._nodes[key]:
            lost = {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}
            nodes[:] = [other for other in nodes if other not in lost]
        nodes.append(node)
        return len(nodes)

    def end(self, key: str) -> None:
        """Forget the attempts: the process survived the work."""
        self._nodes.pop(key, None)


@contextmanager
def crash_counter() -> Iterator[Any]:
    """A `CrashCounter` actor for the block, on this node: losing another one loses no counts."""
    import ray

    from mnistsum_ray.cluster.nodes import on_node

    # Started again where memory is short: a lost count must not end the work.
    counter = ray.remote(CrashCounter).options(**on_node(), max_restarts=-1, max_task_retries=-1).remote()
    try:
        yield counter
    finally:  # an error's traceback would keep it
        with suppress(Exception):  # the cluster may have ended
            ray.kill(counter)


def begin(counter: Any, key: str) -> int:
    """Count an attempt of this process (`CrashCounter.begin`); one that survives calls `end`."""
    import ray

    return int(ray.get(counter.begin.remote(key, ray.get_runtime_context().get_node_id())))


def map_files(
    read: ReadFiles, folder: Location, files: pa.Table, on_progress: Callable[[int], None] = lambda _: None
) -> pa.Table:
    """Apply `read` to all files and return its rows in the order of the files. An OSError of `read` is raised as it is.

    More than MAX_LOCAL_FILES files are read on the cluster, which must be connected; `on_progress` gets numbers of files.

    Raises:
        RunError: the processes that read some of the files die.
    """
    if files.num_rows <= MAX_LOCAL_FILES:
        return _read_in_threads(read, folder, files)
    import ray

    def read_counted(read: ReadFiles, folder: Location, files: pa.Table, counter: Any) -> pa.Table:
        first, last = ((folder / files["name"][row].as_py()).display for row in (0, -1))
        if begin(counter, first) > MAX_CRASHES:
            raise RunError(f"{first} to {last}: the process that reads them died {MAX_CRASHES} times ({CAUSES})")
        found = _read_in_threads(read, folder, files)
        counter.end.remote(first)
        return found

    task = ray.remote(read_counted).options(scheduling_strategy="SPREAD", max_retries=-1)
    chunks = [files.slice(start, _FILES_PER_TASK) for start in range(0, files.num_rows, _FILES_PER_TASK)]
    with crash_counter() as counter:
        results = {task.remote(read, folder, chunk, counter): chunk.num_rows for chunk in chunks}
        waiting = list(results)
        while waiting:
            (finished,), waiting = ray.wait(waiting, num_returns=1)
            on_progress(results[finished])
        try:
            return pa.concat_tables(ray.get(list(results)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, OSError | RunError) else error from None


def _read_in_threads(read: ReadFiles, folder: Location, files: pa.Table) -> pa.Table:
    # An object store answers slowly but takes many requests at once. A local disk answers at once, and threads slow it down.
    threads = 1 if folder.is_local else _THREADS
    share = max(1, -(-files.num_rows // threads))
    shares = [files.slice(start, share) for start in range(0, max(1, files.num_rows), share)]
    with ThreadPoolExecutor(threads) as pool:
        return pa.concat_tables(pool.map(partial(read, folder), shares))
