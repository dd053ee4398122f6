"""One run at a time in an output folder: its file `_lock` holds the id of the run.

On a disk the run has a lock of the kernel on that file, which ends with its process. In an object
store the file is a lease: its holder writes it again every two seconds, and a run that sees it
unchanged for twelve takes it over. The writes are conditional: of two runs at once one is refused.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from mnistsum_ray.errors import (
    ExistingFileError,
    RequestError,
    RunError,
    StorageError,
    TryAgainError,
    one_line,
)
from mnistsum_ray.storage import object_store
from mnistsum_ray.storage.folder import OutputFolder
from mnistsum_ray.storage.location import Location

LOCK_NAME: Final = "_lock"

HEARTBEAT_SECONDS: Final = 2.0
LEASE_TTL_SECONDS: Final = 12.0
_CHECK_SECONDS: Final = 1.0


@dataclass
class FolderLock:
    """The lock of a folder that a run holds. Its workers get a pickled copy."""

    place: Location
    holder: str
    """Id of the run."""
    _checked: float = field(default=float("-inf"), repr=False)

    def check(self) -> None:
        """RunError: another run has taken the folder, or may have, since the storage is silent."""
        asked = time.monotonic()
        if asked - self._checked < _CHECK_SECONDS:  # not so in a process that was suspended
            return
        try:
            holder = _holder_in(self.place.read_bytes())
            lost = f"another run has taken the output ({holder})" if holder != self.holder else ""
        except (StorageError, RequestError) as error:
            lost = one_line(error)
        if lost:
            raise RunError(f"{self.place.display}: {lost}; this run stops, what it has committed stays")
        self._checked = asked

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_checked": float("-inf")}


@contextmanager
def folder_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[OutputFolder]:
    """Hold a folder, which is created where it is missing, while the block runs.

    TryAgainError: another run holds it. RequestError: it, or its storage, cannot be used so.
    """
    folder = folder.with_retries()
    lock = FolderLock(folder / LOCK_NAME, f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}")
    refused = f"{flag} {folder.display}:"
    try:
        held = _lock_file(lock) if folder.is_local else _Lease(lock, say)
    except (TryAgainError, RequestError) as error:
        raise type(error)(f"{refused} {error}") from None
    except OSError as error:
        raise RequestError(f"{refused} cannot be written ({error.strerror or one_line(error)})") from None
    with closing(held):
        yield OutputFolder(folder, lock)


def _holder_in(data: bytes) -> str:
    """Id of the run in a lock; empty if its run was killed before it wrote that."""
    try:
        return str(json.loads(data)["id"]) if data else ""
    except (ValueError, TypeError, KeyError, RecursionError):
        reason = "is not a file of this program; move it away, or choose another folder"
        raise RequestError(f"{LOCK_NAME} {reason}") from None


def _held_by(holder: str | None) -> TryAgainError:
    known = f" ({holder})" if holder else ""
    return TryAgainError(f"another run{known} is writing there; wait for it, or choose another")


def _lock_file(lock: FolderLock) -> IO[bytes]:
    """A file with the id of a run, and with a lock of the kernel that is held until the file is closed."""
    path = Path(lock.place.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _holder_in(file.read())
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"id": lock.holder}).encode())
            return file
        raise _held_by(_holder_in(file.read()))
    except BaseException:
        file.close()
        raise


class _Lease:
    """The lock of a folder in an object store, which a thread renews until it is closed."""

    def __init__(self, lock: FolderLock, say: Callable[[str], None]) -> None:
        """Take the lease, or raise TryAgainError if another run renews it, or was faster."""
        self._filesystem, self._path = lock.place.filesystem, lock.place.path
        self._holder = lock.holder
        left, self._version = self._wait_until_free()
        if left is not None:
            say(f"{lock.place.display} was left by a run that no longer renews it ({left}); taking it over")
        self._renew()
        with suppress(ExistingFileError):  # it exists now
            object_store.put(self._filesystem, self._path, b"")
            object_store.delete(self._filesystem, [self._path])
            raise StorageError("the storage ignores the condition If-None-Match, so two runs could write there at once")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewed, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Delete the lock, unless another run has taken it."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError, RequestError):
            if self._read()[0] == self._holder:
                object_store.delete(self._filesystem, [self._path])

    def _read(self) -> tuple[str | None, object_store.Version | None]:
        """Holder and version of the lock; None where there is none."""
        found = object_store.get(self._filesystem, self._path)
        return (_holder_in(found[0]), found[1]) if found else (None, None)

    def _wait_until_free(self) -> tuple[str | None, object_store.Version | None]:
        """Holder and version of a lease that has expired; None where there is none."""
        found = self._read()
        started = time.monotonic()
        while found[1] and time.monotonic() - started < LEASE_TTL_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 2)
            now = self._read()
            if now[1] and now != found:
                raise _held_by(now[0])
            found = now
        return found

    def _renew(self) -> None:
        """Write the next record over the last one."""
        # Of one length: Arrow asks for a file's size first, and would cut off a longer one.
        record = json.dumps({"id": self._holder, "beat": f"{time.time():.3f}"}).encode()
        try:
            self._version = object_store.put(self._filesystem, self._path, record, self._version)
        except ExistingFileError:
            # If the answer to a write was lost, the store holds this run's own record.
            holder, version = self._read()
            if holder != self._holder:
                raise _held_by(holder) from None
            self._version = object_store.put(self._filesystem, self._path, record, version)

    def _keep_renewed(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # FolderLock.check sees when another run has taken it
                self._renew()
