"""The lock file of an output folder: its JSON record, and on a disk the kernel's lock on it.

`fcntl.flock` is called here, not the `filelock` library, for these reasons (versions 3.15 to 4.3):
- Scoring publishes by exchanging two folders, and both hold a hard link of the lock file meanwhile, so that the output is never
  unlocked. filelock only asks whether the file that it locked has any link left, not whether it is still the one at the path; and
  4.3 refuses a file with two links in a folder that a group may write, if it is to hand out the descriptor for the record.
- Before 3.30, a run that is refused has emptied the record of the holder. Up to 4.0, a file of that name that belongs to another
  program is emptied.
- filelock creates a missing file and opens it for writing, but `check_not_locked` must not change anything.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

LOCK_NAME: Final = "_lock"

_MAX_RECORD_BYTES: Final = 10_000


def read_lock(place: Location) -> dict[str, Any] | None:
    """The record of a lock file, with the key `id`: the run that holds or held it. None where the file is missing.

    Raises:
        OSError: the file cannot be read, or is not a lock.
    """
    try:
        record = place.read_json()
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "id" not in record:
        raise OSError(f"{place.display} is not a lock")
    return record


def locked_error(folder: Location, flag: str, record: dict[str, Any] | None) -> RequestError:
    """Error for a folder that another run holds; the message names that run where its record is known."""
    holder = f" ({record['id']})" if record else ""
    return RequestError(f"{flag} {folder.display}: another run{holder} is writing there; wait for it, or choose another")


def taken_over_message(record: dict[str, Any] | None) -> str:
    """Message for a run whose lock now has the record of another run, or no record."""
    return f"another run has taken the output ({record['id'] if record else 'its lock is gone'})"


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
def kernel_lock(folder: Location, flag: str, holder: str) -> Iterator[None]:
    """Hold a local folder with `flock`, which the kernel releases when the process ends, however it ends.

    The folder is created where it is missing. Afterwards the lock file is deleted, and so are created folders that are empty.

    Args:
        flag: names the folder in messages.
        holder: id of this run, for the record.

    Raises:
        RequestError: another run holds the folder, it cannot be written, or its lock file is of another program.
    """
    path = Path(folder.path, LOCK_NAME)
    created = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    record = json.dumps({"id": holder}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        if not _is_lock(os.pread(file, _MAX_RECORD_BYTES, 0)):
            os.close(file)
            raise RequestError(
                f"{flag} {folder.display}: {LOCK_NAME} is not a file of this program; move it away, or choose another folder"
            )
        # First written, then cut, then synced: workers on other nodes may read it through a network file system at any moment.
        os.pwrite(file, record, 0)
        os.ftruncate(file, len(record))
        os.fsync(file)
    except BlockingIOError:
        raise locked_error(folder, flag, _read_if_whole(folder)) from None
    except OSError as error:
        raise RequestError(f"{flag} {folder.display}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                path.unlink()
        os.close(file)
        with suppress(OSError):  # the first folder that is not empty ends the loop
            for parent in created:
                parent.rmdir()


def _open_locked(path: Path) -> int:
    """Open and lock a file, which is created where it is missing; the file descriptor.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened for writing, or is a symbolic link.
    """
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls its holder may have deleted it, and a third run may have made and locked a new one.
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _read_if_whole(folder: Location) -> dict[str, Any] | None:
    """The record of a folder's lock file; None where its holder has not written it yet."""
    try:
        return read_lock(folder / LOCK_NAME)
    except OSError:
        return None


def _is_lock(data: bytes) -> bool:
    """True for a record, and for an empty file: a run may have been killed before it wrote its record."""
    try:
        record = json.loads(data or b'{"id": null}')
    except ValueError:
        return False
    return isinstance(record, dict) and "id" in record
