"""Files and folders on a disk or in an object store: read, write whole, list, delete."""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.errors import StorageError
from mnistsum_ray.storage import object_store

T = TypeVar("T")

_PARTIAL: Final = re.compile(r"\.mnistsum-[0-9a-f]{16}\.partial")
"""Name of an unfinished file. It is short whatever the final name is: file systems allow 255 bytes."""

_PATIENCE_SECONDS: Final = 30.0

_MAX_BYTES: Final = 2**28
"""Largest file that is read whole: a name may lead to a device without end."""


@dataclass(frozen=True)
class Location:
    """A path on a file system: a local folder or file, or a key or prefix of an object store."""

    filesystem: pafs.FileSystem
    path: str
    display: str
    """For messages and files: an absolute path, or a URI without keys and passwords."""

    def __truediv__(self, name: str) -> "Location":
        base, question, query = (self.display, "", "") if self.is_local else self.display.partition("?")
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{base.rstrip('/')}/{name}{question}{query}")

    @property
    def is_local(self) -> bool:
        """True on a disk of this machine or a mounted file system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def at(self, path: str) -> "Location":
        """Another path on the same file system. Its `display` has the scheme and the path, no other part of the URI."""
        scheme, colon, _ = self.display.partition("://")
        return Location(self.filesystem, path, f"{scheme}://{path}" if colon else path)

    def with_retries(self) -> "Location":
        """The same location, but S3 is retried for about 50 s; for runs that must survive a short outage."""
        if type(self.filesystem) is not pafs.S3FileSystem:
            return self
        return replace(self, filesystem=object_store.RetryingS3FileSystem(**object_store.options_of(self.filesystem)))

    def info(self) -> pafs.FileInfo:
        """File info; its type is NotFound where nothing exists."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """True for a file, for a folder, and in an object store for a prefix with at least one key below it."""
        return bool(self.info().type != pafs.FileType.NotFound)

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            OSError: the storage does not answer, the file is missing, or has more than _MAX_BYTES.
        """
        with self.filesystem.open_input_stream(self.path) as stream:
            data = bytes(stream.read(_MAX_BYTES))
        if len(data) == _MAX_BYTES:
            raise OSError(f"{self.display} is larger than any file of this program")
        return data

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Write a file that appears under its name only when it is complete, also if the power fails."""
        if not self.is_local:  # an object appears whole or not at all
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        folder = Path(self.path).parent
        _make_folder(folder)
        partial = folder / f".mnistsum-{secrets.token_hex(8)}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(folder)

    def create(self, data: pa.Buffer) -> None:
        """Write a file as `write_bytes` does, but only if it does not exist.

        In an object store the write itself is conditional. On a disk the lock of the folder keeps other runs away.

        Raises:
            FileExistsError: it exists.
        """
        if not self.is_local:
            object_store.put(self.filesystem, self.path, data.to_pybytes())
        elif Path(self.path).exists():
            raise FileExistsError(f"{self.display} exists")
        else:
            self.write_bytes(data)

    def move(self, target: "Location") -> None:
        """Move this file to another path on the same file system, whose folder is made where it is missing."""
        if not self.is_local:  # Arrow's own `move` lacks Azure accounts without hierarchical namespace
            self.filesystem.copy_file(self.path, target.path)
            self.filesystem.delete_file(self.path)
            return
        folder = Path(target.path).parent
        _make_folder(folder)
        Path(self.path).rename(target.path)
        _sync_folder(folder)

    def modified(self, info: pafs.FileInfo) -> int:
        """Modification time of a file here, in nanoseconds since 1970.

        In an object store it is rounded down to seconds: a listing may give a finer time than a request for one object.
        """
        exact: int = info.mtime_ns
        return exact if self.is_local else exact - exact % 10**9

    def delete(self) -> None:
        """Delete a file; a missing file is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path)

    def files(self) -> list[pafs.FileInfo]:
        """All files below a folder, sorted by path; none where the folder is missing. Links to folders are not followed."""
        wanted: pafs.FileSelector | list[str] = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        if self.is_local:  # Arrow follows links
            found = (f"{folder.rstrip('/')}/{name}" for folder, _, names in os.walk(self.path) for name in names)
            wanted = list(filter(is_utf8, found))
        infos = (info for info in self.filesystem.get_file_info(wanted) if info.type == pafs.FileType.File)
        return sorted(infos, key=lambda info: str(info.path))

    def read_json(self) -> Any:
        """The JSON value of the file.

        Raises:
            ValueError: the file is not JSON, or is nested too deeply.
        """
        try:
            return json.loads(self.read_bytes())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write_json(self, value: Any) -> None:
        """Write a JSON value as `write_bytes` does. Infinite numbers and NaN, which JSON lacks, are a ValueError."""
        self.write_bytes((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def retried(attempt: Callable[[], T]) -> T:
    """What `attempt` returns; it is called again while it raises StorageError, for half a minute."""
    backoff = Backoff()
    while True:
        try:
            return attempt()
        except StorageError:
            if not backoff.pause():
                raise


class Backoff:
    """Pauses between attempts to reach a storage that fails: 1 s, then each twice as long as the one before."""

    def __init__(self) -> None:
        self._pause, self._failing_since = 1.0, 0.0

    def pause(self) -> bool:
        """Sleep after a failed attempt; False, without a pause, if the attempts have failed for half a minute."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= _PATIENCE_SECONDS:
            return False
        time.sleep(self._pause)
        self._pause *= 2
        return True


def is_utf8(path: str) -> bool:
    """True if a path can be encoded as UTF-8, which Arrow needs; names on a disk may hold any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_hidden(name: str) -> bool:
    """True if readers of Parquet skip a file of this name, since it, or a folder of it, begins with `.` or `_`."""
    return any(component.startswith((".", "_")) for component in name.split("/"))


def is_partial(name: str) -> bool:
    """True if a file name, without its folder, is that of an unfinished file of this program."""
    return _PARTIAL.fullmatch(name) is not None


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing; their entries survive a power cut, too."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
