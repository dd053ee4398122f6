"""One run at a time in a folder on a disk."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from mnistsum_ray.errors import TryAgainError
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error

LOCK_NAME: Final = "_lock"
"""The file that is locked, by the kernel until its process ends; it names who holds the folder."""


@contextmanager
def folder_lock(folder: Location, flag: str) -> Iterator[None]:
    """Hold a folder on a disk, which is created where it is missing, while the block runs.

    In a store nothing is held: each attempt writes a folder of its own, each file that is published
    is whole, and two runs of the same seed publish the same. Two of unlike seeds under one name
    leave the files of both.

    Raises:
        TryAgainError: another run holds it.
        RequestError: it cannot be written.
    """
    if not folder.is_local:
        yield
        return
    with _locked_file(folder, flag):
        yield


def _locked_file(folder: Location, flag: str) -> IO[bytes]:
    path = Path(folder.path, LOCK_NAME)
    with as_request_error(flag), (folder / LOCK_NAME).storage_errors("written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            running = f"another run ({path.read_text()}) is writing there"
            advice = "wait for it, or choose another"
            raise TryAgainError(f"{flag} {folder.display}: {running}; {advice}") from None
        file.truncate(0)
        file.write(f"{socket.gethostname()}:{os.getpid()}".encode())
        return file
