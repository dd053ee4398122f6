"""One training at a time in a run folder: the file `_lock` there holds the id of the run.

On a disk the kernel locks that file until its process ends. In an object store the run writes it
again every ten seconds; a run that finds one which is a minute old, by the store's own clock, takes
it over. The writes are conditional: of two runs at once one fails.
"""

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any, Final

from mnistsum_ray.errors import (
    ExistingFileError,
    MissingFileError,
    RequestError,
    RunError,
    StorageError,
    TryAgainError,
)
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import refused

LOCK_NAME: Final = "_lock"
RENEW_SECONDS: Final = 10.0
EXPIRED_SECONDS: Final = 60.0


class FolderLock:
    """The lock of a folder that this run holds."""

    def __init__(self, folder: Location, flag: str) -> None:
        self.file = folder / LOCK_NAME
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._name = f"{flag} {folder.display}"

    def check(self) -> None:
        """RunError: another run has taken the folder. StorageError: the storage does not say."""
        try:
            holder = self.read_holder()
        except MissingFileError:
            holder = "which has ended, or the lock was deleted"
        if holder != self.holder:
            problem = f"another run has taken the output ({holder})"
            raise RunError(f"{self._name}: {problem}; this run stops, its checkpoints stay")

    def read_holder(self) -> str:
        """Id of the run that holds the folder; empty if it was killed before it wrote that."""
        data = self.file.read_bytes()
        try:
            return str(json.loads(data)["id"]) if data else ""
        except (ValueError, TypeError, KeyError, RecursionError):
            problem = f"{LOCK_NAME} is not a file of this program; move it away"
            raise RequestError(f"{self._name}: {problem}, or choose another folder") from None

    def refusal(self, hint: str = "") -> TryAgainError:
        problem = f"another run ({self.read_holder()}) is writing there; wait for it"
        return TryAgainError(f"{self._name}: {problem}, or choose another{hint}")


@contextmanager
def folder_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[FolderLock]:
    """Hold a folder, which is created where it is missing, while the block runs.

    TryAgainError: another run holds it. RequestError: it, or its storage, cannot be used so.
    """
    lock = FolderLock(folder, flag)
    with ExitStack() as held:
        with refused(flag), lock.file.answers("written"):
            held.enter_context(_lock_file(lock) if folder.is_local else _lock_object(lock, say))
        yield lock


def _lock_file(lock: FolderLock) -> IO[bytes]:
    """The open file, which the kernel locks until it is closed."""
    path = Path(lock.file.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab", buffering=0)
    lock.read_holder()  # refuses a file that is not ours
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise lock.refusal() from None
    file.truncate(0)
    file.write(json.dumps({"id": lock.holder}).encode())
    return file


@contextmanager
def _lock_object(lock: FolderLock, say: Callable[[str], None]) -> Iterator[None]:
    """Write the object, which a thread renews until the block ends."""
    found = _metadata(lock.file)
    if found:
        probe = lock.file.at(f"{lock.file.path}-{secrets.token_hex(4)}")
        probe.write({})
        age = _metadata(probe)["last_modified"] - found["last_modified"]
        probe.delete()
        left = EXPIRED_SECONDS - age.total_seconds()
        if left > 0:
            raise lock.refusal(f"; if it was killed, this command takes over in {left:.0f} s")
        say(f"{lock.file.display}: {lock.read_holder()} no longer renews it; taking it over")
    try:
        _put(lock, found)
    except ExistingFileError:
        if lock.read_holder() != lock.holder:  # else the answer to a first attempt was lost
            raise lock.refusal() from None
    ended = Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with suppress(StorageError, RunError, RequestError):  # a later `check` meets it
                last = _metadata(lock.file)
                lock.check()
                _put(lock, last)

    Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(StorageError, RunError, RequestError):
            lock.check()
            lock.file.delete()


def _metadata(file: Location) -> Any:
    """What the store says of an object; None where there is none."""
    with file.answers("read"):
        try:
            return file.store.head(file.path)
        except FileNotFoundError:
            return None


def _put(lock: FolderLock, last: Any) -> None:
    """Write the object if it is still as at `last`; None: if there is none."""
    # Each record is another one, since an ETag may be that of the content.
    record = {"id": lock.holder, "write": secrets.token_hex(4)}
    version = {name: last[name] for name in ("e_tag", "version") if last[name]} if last else None
    with lock.file.answers("written"):
        lock.file.store.put(lock.file.path, json.dumps(record).encode(), mode=version or "create")
