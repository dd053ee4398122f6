"""TODO storage.file_lock"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME, MAX_LOCK_BYTES, is_lock, locked_error, read_lock


def check_not_locked(folder: Location, flag: str) -> None:
    """Refuse a folder on a disk that another run holds at this moment; nothing is made or changed."""
    path = Path(folder.path, LOCK_NAME)
    if not folder.is_local or not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise locked_error(folder, flag, read_lock(folder / LOCK_NAME)) from None


@contextmanager
def file_lock(folder: Location, flag: str, holder: str) -> Iterator[None]:
    path = Path(folder.path, LOCK_NAME)
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    written = json.dumps({"id": holder}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        if not is_lock(os.pread(file, MAX_LOCK_BYTES, 0)):
            os.close(file)
            raise RequestError(
                f"{flag} {folder.display}: {LOCK_NAME} is not a file of this program; move it away, or choose another folder"
            )
        # In this order, and at once, since workers on other nodes may see the folder through a network file system.
        os.pwrite(file, written, 0)
        os.ftruncate(file, len(written))
        os.fsync(file)
    except BlockingIOError:
        raise locked_error(folder, flag, None) from None
    except OSError as error:
        raise RequestError(f"{flag} {folder.display}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                path.unlink()
        os.close(file)
        with suppress(OSError):  # of folders that were made for nothing, none is left
            for parent in made:
                parent.rmdir()


def _open_locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have deleted it in between: then it is another file that counts.
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
