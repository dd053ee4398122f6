"""One run at a time in an output folder: its file `_lock` names the run that holds it.

On a disk the holder also has a lock of the kernel on that file, which ends with its process; the file stays. In an object store
the file is a lease (lease.py), which its holder renews. `FolderLock.check` is the one question, asked by driver and workers.
"""

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.errors import RequestError, RunError
from mnistsum_ray.storage.lease import Lease
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME, is_lock, locked_error, read_lock, taken_over_message

_CHECK_SECONDS: Final = 1.0
"""Seconds between two looks at the lock."""


@dataclass
class FolderLock:
    """A folder that a run holds. Its workers get a pickled copy."""

    place: Location
    """The lock file."""
    holder: str
    """Id of the run."""
    conditional_writes: bool = False
    """Whether the storage has conditional writes, so that no file of another run is ever replaced."""
    lease: Lease | None = None
    """In the driver of a run in an object store."""
    _checked: float = field(default=float("-inf"), repr=False)

    def check(self) -> None:
        """Check that this run still holds the folder; reads the lock at most once a second.

        Raises:
            RunError: another run has taken it.
            OSError: the storage does not answer.
        """
        if self.lease:
            self.lease.check()
        # A suspended process reads the lock again when it goes on: the clock has advanced meanwhile.
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        record = read_lock(self.place)
        if record is None or record["id"] != self.holder:
            raise RunError(f"{self.place.display}: {taken_over_message(record)}; this run stops, what it has committed stays")
        self._checked = now

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lease": None, "_checked": float("-inf")}


@contextmanager
def folder_lock(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[FolderLock]:
    """Hold a folder, which is created where it is missing.

    Args:
        folder: local, or in an object store.
        flag: names the folder in messages.
        say: writes a console line.

    Raises:
        RequestError: another run holds it, or it cannot be written.
    """
    holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    lock = FolderLock((folder / LOCK_NAME).with_retries(), holder)
    if folder.is_local:
        with _kernel_lock(folder, flag, holder):
            yield lock
    else:
        with Lease(folder, flag, holder, say) as lease:
            yield replace(lock, conditional_writes=lease.conditional, lease=lease)


def check_not_locked(folder: Location, flag: str) -> None:
    """Refuse a local folder that another run holds now, without changing the folder.

    Raises:
        RequestError: another run holds it.
    """
    path = Path(folder.path, LOCK_NAME)
    if not folder.is_local or not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise locked_error(folder, flag, _read_if_whole(folder)) from None


@contextmanager
def _kernel_lock(folder: Location, flag: str, holder: str) -> Iterator[None]:
    """Hold a local folder with `flock`, which the kernel releases when the process ends, however it ends."""
    path = Path(folder.path, LOCK_NAME)
    record = json.dumps({"id": holder}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise RequestError(f"{flag} {folder.display}: cannot be written ({error.strerror or error})") from None
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_lock(file.read()):
                raise RequestError(
                    f"{flag} {folder.display}: {LOCK_NAME} is not a file of this program; move it away, or choose another folder"
                )
            # First written, then cut: workers on other nodes may read it through a network file system at any moment.
            os.pwrite(descriptor, record, 0)
            file.truncate(len(record))
            os.fsync(descriptor)
        except BlockingIOError:
            raise locked_error(folder, flag, _read_if_whole(folder)) from None
        except OSError as error:
            raise RequestError(f"{flag} {folder.display}: cannot be written ({error.strerror or error})") from None
        yield


def _read_if_whole(folder: Location) -> dict[str, Any] | None:
    """The record of a folder's lock file; None where its holder has not written it yet."""
    try:
        return read_lock(folder / LOCK_NAME)
    except OSError:
        return None
