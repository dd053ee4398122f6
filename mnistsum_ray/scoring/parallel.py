"""Work on many files at once: small amounts in threads of this process, large ones on the cluster."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pyarrow as pa

from mnistsum_ray.storage.location import Location

MAX_LOCAL_FILES: Final = 64
"""So many files are looked at from here sooner than a cluster could begin."""

_CHUNK: Final = 500
_THREADS: Final = 16

Reader = Callable[[Location, pa.Table], pa.Table]
"""Takes a folder and rows that name files in it; gives rows about them."""


def map_files(look: Reader, folder: Location, files: pa.Table, seen: Callable[[int], None] = lambda _: None) -> pa.Table:
    """`look` at all files, in their order: on the cluster if they are many, and so never before it is joined.

    `seen` is told of so many more files from time to time.
    """
    if files.num_rows <= MAX_LOCAL_FILES:
        return _with_threads(look, folder, files)
    import ray  # a second to import, which a refusal need not wait for

    task = ray.remote(_with_threads).options(scheduling_strategy="SPREAD")
    chunks = [files.slice(start, _CHUNK) for start in range(0, files.num_rows, _CHUNK)]
    looked = [task.remote(look, folder, chunk) for chunk in chunks]
    sizes = {of_chunk: chunk.num_rows for of_chunk, chunk in zip(looked, chunks, strict=True)}
    waiting = list(looked)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        seen(sizes[done])
    return pa.concat_tables(ray.get(looked))


def _with_threads(look: Reader, folder: Location, files: pa.Table) -> pa.Table:
    # An object store answers late, and many requests at once; a local disk answers at once, and threads only get in the way.
    threads = 1 if folder.is_local else _THREADS
    share = max(1, -(-files.num_rows // threads))
    with ThreadPoolExecutor(threads) as pool:
        parts = [files.slice(start, share) for start in range(0, max(1, files.num_rows), share)]
        return pa.concat_tables(pool.map(lambda part: look(folder, part), parts))
