"""One training at a time in a run folder: the file `_lock` there holds the id of the run.

On a disk the kernel locks that file until its process ends. In an object store the run writes it
again every 15 seconds; a run that finds one which is a minute old, by the store's own clock, takes
it over. The writes are conditional: of two runs at once one fails.
"""

import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

from mnistsum_ray.errors import (
    ConflictError,
    MissingFileError,
    RunError,
    StorageError,
    TryAgainError,
)
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import as_request_error

LOCK_NAME: Final = "_lock"
RENEW_SECONDS: Final = 15.0
EXPIRED_SECONDS: Final = 60.0


class FolderLock:
    """The lock of a folder that this run holds."""

    def __init__(self, folder: Location, flag: str) -> None:
        self.file = folder / LOCK_NAME
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._name = f"{flag} {folder.display}"

    def read_holder(self) -> str:
        """Id of the run that holds the folder; empty where it has just ended."""
        with suppress(MissingFileError):
            return self.file.read_bytes().decode(errors="replace").partition(" ")[0]
        return ""

    def check(self) -> None:
        """RunError: another run has taken the folder. StorageError: the storage does not say."""
        holder = self.read_holder()
        if holder != self.holder:
            problem = f"another run has taken the output ({holder})"
            raise RunError(f"{self._name}: {problem}; this run stops, its checkpoints stay")

    def refusal(self, hint: str = "") -> TryAgainError:
        problem = f"another run ({self.read_holder()}) is writing there; wait for it"
        return TryAgainError(f"{self._name}: {problem}, or choose another{hint}")

    def put(self, last: Any) -> None:
        """Write the object if it is still as the store said at `last`; None: if there is none."""
        mode: Any = "create"
        if last:
            mode = {name: last[name] for name in ("e_tag", "version") if last[name]}
        # Each record is another one, since an ETag may be that of the content.
        record = f"{self.holder} {secrets.token_hex(4)}".encode()
        with self.file.storage_errors("written"):
            self.file.store.put(self.file.path, record, mode=mode)


@contextmanager
def folder_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[FolderLock]:
    """Hold a folder, which is created where it is missing, while the block runs.

    TryAgainError: another run holds it. RequestError: it, or its storage, cannot be used so.
    """
    lock = FolderLock(folder, flag)
    with ExitStack() as until_end:
        with as_request_error(flag), lock.file.storage_errors("written"):
            held = _hold_file(lock) if folder.is_local else _hold_object(lock, say)
            until_end.enter_context(held)
        yield lock


@contextmanager
def _hold_file(lock: FolderLock) -> Iterator[None]:
    path = Path(lock.file.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise lock.refusal() from None
        file.truncate(0)
        file.write(lock.holder.encode())
        yield


@contextmanager
def _hold_object(lock: FolderLock, say: Callable[[str], None]) -> Iterator[None]:
    found = _metadata(lock.file)
    if found:
        new = lock.file.at(f"{lock.file.path}-{secrets.token_hex(4)}")
        new.write(b"")
        age = _metadata(new)["last_modified"] - found["last_modified"]  # by the store's clock
        new.delete()
        left = EXPIRED_SECONDS - age.total_seconds()
        if left > 0:
            raise lock.refusal(f"; if it was killed, this command takes over in {left:.0f} s")
        say(f"{lock.file.display}: {lock.read_holder()} no longer renews it; taking it over")
    try:
        lock.put(found)
    except ConflictError:
        if lock.read_holder() != lock.holder:  # else the answer to a first attempt was lost
            raise lock.refusal() from None
    ended = Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with suppress(StorageError, RunError):  # a later `check` meets it
                last = _metadata(lock.file)
                lock.check()
                lock.put(last)

    Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(StorageError, RunError):
            lock.check()
            lock.file.delete()


def _metadata(file: Location) -> Any:
    """What the store says of an object; None where there is none."""
    with file.storage_errors("read"), suppress(FileNotFoundError):
        return file.store.head(file.path)
    return None
