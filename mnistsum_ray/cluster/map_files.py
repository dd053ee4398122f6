"""Map a function over many files: small numbers in threads of this process, large ones as tasks on the cluster."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa

from mnistsum_ray.errors import RunError
from mnistsum_ray.storage.location import Location

MAX_LOCAL_FILES: Final = 64
"""Up to this number, this process finishes before tasks on a cluster would have started."""

_FILES_PER_TASK: Final = 500
_THREADS: Final = 16

ReadFiles = Callable[[Location, pa.Table], pa.Table]
"""Takes a folder and a table of files in it with the columns `name` and `size`; returns one row per file, in the same order."""


def map_files(
    read: ReadFiles, folder: Location, files: pa.Table, on_progress: Callable[[int], None] = lambda _: None
) -> pa.Table:
    """Apply `read` to all files and return its rows in the order of the files. An OSError of `read` is raised as it is.

    More than MAX_LOCAL_FILES files are read on the cluster, which must be connected; `on_progress` gets the number of files
    that each task has read.

    Raises:
        RunError: the processes that read some of the files die.
    """
    if files.num_rows <= MAX_LOCAL_FILES:
        return _read_in_threads(read, folder, files)
    import ray  # Takes a second to import, and a request that is refused early does not need it.

    from mnistsum_ray.cluster.crash_counter import CAUSES, MAX_CRASHES

    # Ray itself would begin a task again without end when memory is short.
    task = ray.remote(_read_in_threads).options(scheduling_strategy="SPREAD", max_retries=0)
    chunks = [files.slice(start, _FILES_PER_TASK) for start in range(0, files.num_rows, _FILES_PER_TASK)]
    running = {task.remote(read, folder, chunk): index for index, chunk in enumerate(chunks)}
    results: dict[int, pa.Table] = {}
    crashes: Counter[int] = Counter()
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(finished)
        chunk = chunks[index]
        try:
            results[index] = ray.get(finished)
            on_progress(chunk.num_rows)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, OSError) else error from None
        except ray.exceptions.RayError as error:  # the process died, or its node did
            crashes[index] += isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError)
            if crashes[index] == MAX_CRASHES:
                first, last = ((folder / chunk["name"][row].as_py()).display for row in (0, -1))
                raise RunError(f"{first} to {last}: the process that reads them died {MAX_CRASHES} times ({CAUSES})") from None
            running[task.remote(read, folder, chunk)] = index
    return pa.concat_tables(results[index] for index in range(len(chunks)))


def _read_in_threads(read: ReadFiles, folder: Location, files: pa.Table) -> pa.Table:
    # An object store answers slowly but takes many requests at once. A local disk answers at once, and threads slow it down.
    threads = 1 if folder.is_local else _THREADS
    share = max(1, -(-files.num_rows // threads))
    with ThreadPoolExecutor(threads) as pool:
        shares = [files.slice(start, share) for start in range(0, max(1, files.num_rows), share)]
        return pa.concat_tables(pool.map(lambda part: read(folder, part), shares))
