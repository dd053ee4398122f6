"""One run at a time in an output folder: its file `_lock` holds the id of the run.

On a disk the run has a lock of the kernel on that file, which ends with its process; the file stays. In an object store the file
is a lease: its holder writes it again every two seconds, and a run that sees it unchanged for twelve takes it over. Its writes
are conditional, so of two runs at the same moment one is refused.
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
    MissingFileError,
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
"""Seconds without a heartbeat after which another run may take the lease: its holder was killed or suspended."""

_CHECK_SECONDS: Final = 1.0
"""A lock is read at most once in this time."""
_UNKNOWN_SECONDS: Final = 120.0
"""Time without an answer of the storage after which the run gives up."""


class _HeldError(Exception):
    """Another run holds the lock. The message is its id, if that is known."""


@dataclass
class FolderLock:
    """The lock of a folder that a run holds. Its workers get a pickled copy."""

    place: Location
    holder: str
    """Id of the run."""
    lease: "_Lease | None" = None
    """The lock in an object store, in the driver of its run; None in workers and on a disk."""
    _checked: float = field(default=float("-inf"), repr=False)

    def check(self) -> None:
        """Check that this run still holds the folder; wait while that is unknown.

        Raises:
            RunError: another run has taken the folder, or may have: for two minutes the lock could not be read, or not renewed.
        """
        asked = time.monotonic()
        # A suspended process reads the lock again when it goes on: the clock has advanced meanwhile.
        while (now := time.monotonic()) - self._checked >= _CHECK_SECONDS:
            lost, reason = False, ""
            try:
                holder = self._found_holder()
                lost = holder != self.holder
                if lost:
                    reason = f"another run has taken the output ({holder or 'its lock is gone'})"
                elif self.lease and not self.lease.is_fresh():
                    reason = "its lock is not renewed"
            except StorageError as error:
                reason = one_line(error)
            if not reason:
                self._checked = now
                return
            if lost or now - asked >= _UNKNOWN_SECONDS:
                raise RunError(f"{self.place.display}: {reason}; this run stops, what it has committed stays")
            time.sleep(HEARTBEAT_SECONDS / 4)

    def _found_holder(self) -> str:
        """Id in the lock; empty where it is gone, or what is there is no lock."""
        with suppress(MissingFileError, ValueError):
            return _holder_in(self.place.read_bytes())
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lease": None, "_checked": float("-inf")}


@contextmanager
def folder_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[OutputFolder]:
    """Hold a folder, which is created where it is missing, while the block runs. `flag` names it in messages.

    Raises:
        TryAgainError: another run holds it.
        RequestError: it cannot be written, or its storage has no conditional writes.
    """
    folder = folder.with_retries()
    lock = FolderLock(folder / LOCK_NAME, f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}")
    refused = f"{flag} {folder.display}:"
    try:
        above = (Path(folder.path), *Path(folder.path).parents) if folder.is_local else ()
        made = [path for path in above if not path.exists()]
        held = _lock_file(lock) if folder.is_local else _Lease(lock, say)
    except _HeldError as error:
        holder = f" ({error})" if str(error) else ""
        raise TryAgainError(f"{refused} another run{holder} is writing there; wait for it, or choose another") from None
    except ValueError:
        advice = "move it away, or choose another folder"
        raise RequestError(f"{refused} {LOCK_NAME} is not a file of this program; {advice}") from None
    except OSError as error:
        raise RequestError(f"{refused} cannot be written ({error.strerror or one_line(error)})") from None
    with closing(held):
        try:
            yield OutputFolder(folder, lock)
        finally:
            if made:
                _delete_unused(made)


def _holder_in(data: bytes) -> str:
    """Id of the run in a lock; empty if its run was killed before it wrote that. What is no lock is a ValueError."""
    try:
        return str(json.loads(data)["id"]) if data else ""
    except (TypeError, KeyError, RecursionError):
        raise ValueError("this JSON is no lock") from None


def _delete_unused(made: list[Path]) -> None:
    """Delete a folder that a run has made, and those above it, if it holds nothing but its lock, as after a refused request."""
    with suppress(OSError):
        if [path.name for path in made[0].iterdir()] == [LOCK_NAME]:
            (made[0] / LOCK_NAME).unlink()
            for path in made:
                path.rmdir()


def _lock_file(lock: FolderLock) -> IO[bytes]:
    """A file with the id of a run, and with a lock of the kernel that is held until the file is closed."""
    path = Path(lock.place.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644), "r+b", buffering=0)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _HeldError(_holder_in(file.read())) from None
        if not path.exists() or not path.samefile(f"/dev/fd/{file.fileno()}"):
            file.close()
            return _lock_file(lock)  # the run before has deleted it at that moment, see `_delete_unused`
        _holder_in(file.read())
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"id": lock.holder}).encode())
        os.fsync(file.fileno())
    except BaseException:
        file.close()
        raise
    return file


class _Lease:
    """The lock of a folder in an object store, which a thread renews until it is closed."""

    def __init__(self, lock: FolderLock, say: Callable[[str], None]) -> None:
        """Take the lease: at once where there is none, else when it has not been renewed for LEASE_TTL_SECONDS.

        Raises _HeldError if another run renews it, or was faster.
        """
        lock.lease = self
        self._place = lock.place
        self._holder = lock.holder
        self._renewed = 0.0
        self._beats = 0
        self._version = self._wait_until_free(say)
        self._renew()
        with suppress(ExistingFileError):  # it exists now
            object_store.put(self._place.filesystem, self._place.path, b"")
            object_store.delete(self._place.filesystem, [self._place.path])
            raise StorageError("the storage ignores the condition If-None-Match, so two runs could write there at once")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewed, daemon=True)
        self._thread.start()

    def is_fresh(self) -> bool:
        """True while no other run may take the lease, with two heartbeats to spare."""
        return time.monotonic() - self._renewed < LEASE_TTL_SECONDS - 2 * HEARTBEAT_SECONDS

    def close(self) -> None:
        """Delete the lock, unless another run has taken it."""
        self._closed.set()
        self._thread.join()
        with suppress(OSError, ValueError):
            found = self._read()
            if found and found[0] == self._holder:
                object_store.delete(self._place.filesystem, [self._place.path])

    def _read(self) -> tuple[str, object_store.Version] | None:
        """Holder and version of the lock; None where there is none."""
        found = object_store.get(self._place.filesystem, self._place.path)
        return (_holder_in(found[0]), found[1]) if found else None

    def _wait_until_free(self, say: Callable[[str], None]) -> object_store.Version | None:
        """Version of an expired lease; None where there is none."""
        found, started = self._read(), time.monotonic()
        while found and time.monotonic() - started < LEASE_TTL_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 2)
            before = found
            asked = time.monotonic()
            found = self._read()
            if found and found != before:
                raise _HeldError(found[0])
            if time.monotonic() - asked > HEARTBEAT_SECONDS:
                started = time.monotonic()  # the storage may have failed, so its holder could not renew it either
        if not found:
            return None
        say(f"{self._place.display} was left by a run that no longer renews it ({found[0]}); taking it over")
        return found[1]

    def _renew(self) -> None:
        """Write the next record over the last one."""
        asked = time.monotonic()
        self._beats += 1
        record = json.dumps({"id": self._holder, "beat": self._beats}).encode()
        try:
            self._version = object_store.put(self._place.filesystem, self._place.path, record, self._version)
        except ExistingFileError:
            # If the answer to a write was lost, the store holds this run's own record.
            found = self._read()
            if not found or found[0] != self._holder:
                raise _HeldError(found[0] if found else "") from None
            self._version = object_store.put(self._place.filesystem, self._place.path, record, found[1])
        self._renewed = asked

    def _keep_renewed(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # FolderLock.check reads the lock, and asks whether it is fresh
                self._renew()
