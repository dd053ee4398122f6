"""Map a function over many files: small numbers in threads of this process, large ones as tasks on the cluster."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.errors import RunError
from mnistsum_ray.storage.location import Location

MAX_LOCAL_FILES: Final = 64
"""Up to this number, this process is done before tasks would have started."""

_FILES_PER_TASK: Final = 500
_THREADS: Final = 16

ReadFiles = Callable[[Location, pa.Table], pa.Table]
"""Takes a folder and a table of files in it with the columns `name` and `size`; returns one row per file, in the same order."""


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
    import ray  # Takes a second to import, and a request that is refused early does not need it.

    from mnistsum_ray.cluster.crash_counter import CAUSES, MAX_CRASHES, begin, crash_counter

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
