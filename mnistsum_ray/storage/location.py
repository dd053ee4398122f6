"""Files and folders on a disk or in an object store, to be read. `folder.py` writes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs  # noqa: TID251

from mnistsum_ray.errors import MissingFileError, StorageError, one_line
from mnistsum_ray.storage import object_store


class Entry(NamedTuple):
    """A file or folder that exists."""

    path: str
    size: int
    modified: int
    """Nanoseconds since 1970, in an object store whole seconds, which all answers agree on; 0 for a folder."""
    is_folder: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Location:
    """A file or folder on a disk, or a key or prefix of an object store.

    All methods raise StorageError, and no other error, where the storage does not answer or refuses.
    """

    filesystem: pafs.FileSystem
    path: str
    display: str
    """The name in messages and files: an absolute path or a URI."""

    def __truediv__(self, name: str) -> "Location":
        path = f"{self.path.rstrip('/')}/{name}"
        if self.is_local:
            return Location(self.filesystem, path, path)
        address, question, query = self.display.partition("?")
        return Location(self.filesystem, path, f"{address.rstrip('/')}/{name}{question}{query}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def at(self, path: str) -> "Location":
        """Another path on the same file system. Its `display` is without the URI's query."""
        scheme, colon, _ = self.display.partition("://")
        return Location(self.filesystem, path, f"{scheme}://{path}" if colon else path)

    def with_retries(self) -> "Location":
        """The same location, with S3 retried for about 50 s, as Google and Azure are."""
        if type(self.filesystem) is not pafs.S3FileSystem:
            return self
        return replace(self, filesystem=object_store.RetryingS3FileSystem(object_store.options_of(self.filesystem)))

    @contextmanager
    def answers(self, what: str = "read") -> Iterator[None]:
        """Raise errors of the storage in the block as StorageError: this place cannot be `what`."""
        try:
            yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise self.error(error, what) from error

    def error(self, error: Exception, what: str = "read") -> StorageError:
        """The error for a file that the storage did not give or take."""
        if isinstance(error, FileNotFoundError):
            advice = ", or not on this node; a local path must be on storage that all nodes share"
            return MissingFileError(f"{self.display}: is not there{advice if self.is_local else ''}")
        return StorageError(f"{self.display}: cannot be {what}: {one_line(error)}")

    def status(self) -> Entry | None:
        """The file or folder here, or None. In an object store a prefix of keys is a folder."""
        with self.answers():
            info = self.filesystem.get_file_info(self.path)
        return None if info.type == pafs.FileType.NotFound else self._entry(info)

    def status_of(self, stream: pa.NativeFile) -> Entry | None:
        """The `status` of this file, which is open. S3 has said it then, and is not asked again."""
        modified = stream.metadata().get("Last-Modified") if self.filesystem.type_name == "s3" else None
        if not modified:
            return self.status()
        return Entry(self.path, stream.size(), int(datetime.fromisoformat(modified.decode()).timestamp()) * 10**9)

    def exists(self) -> bool:
        return self.status() is not None

    def open(self) -> pa.NativeFile:
        """The file, open for reading at any position."""
        with self.answers():
            return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """The whole file. To read a pipe would be to wait, a device may have no end."""
        with self.answers():
            if self.is_local and Path(self.path).exists() and not Path(self.path).is_file():
                raise OSError("it is a folder, a pipe or a device, and no file")
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())

    def read_json(self) -> Any:
        """The JSON value of the file; a ValueError where it is not JSON, or is nested too deeply."""
        try:
            return json.loads(self.read_bytes())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def entries(self) -> list[Entry]:
        """Files and folders in a folder; none where it is missing."""
        with self.answers("listed"):
            infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return [self._entry(info) for info in infos]

    def files(self) -> list[Entry]:
        """All files below a folder, sorted by path; none where the folder is missing. Links to folders are not followed."""
        wanted: pafs.FileSelector | list[str] = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        if self.is_local:  # Arrow follows links
            found = (f"{folder.rstrip('/')}/{name}" for folder, _, names in os.walk(self.path) for name in names)
            wanted = list(filter(is_utf8, found))
        with self.answers("listed"):
            infos = self.filesystem.get_file_info(wanted)
        return sorted(self._entry(info) for info in infos if info.type == pafs.FileType.File)

    def _entry(self, info: pafs.FileInfo) -> Entry:
        if info.type == pafs.FileType.Directory:
            return Entry(info.path, 0, 0, is_folder=True)
        modified = info.mtime_ns
        return Entry(info.path, info.size or 0, modified if self.is_local else modified - modified % 10**9)


def is_utf8(path: str) -> bool:
    """Whether a path can be encoded as UTF-8, which Arrow needs; names on a disk may hold any bytes."""
    return path == path.encode(errors="replace").decode()


def is_hidden(name: str) -> bool:
    """Whether readers of Parquet skip a file of this name, since it, or a folder of it, begins with `.` or `_`."""
    return any(component.startswith((".", "_")) for component in name.split("/"))
