"""Files on a disk, and objects in S3, Google Cloud Storage and Azure: read, write, list, delete.

Each write puts a whole file: a reader sees the old content or the new one, whatever kills the
writer or its machine. Object stores are reached through obstore, which retries.
"""

import errno
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, TypeVar

from obstore import exceptions  # noqa: TID251

from mnistsum_ray.errors import ConflictError, MissingFileError, NoAnswerError, StorageError
from mnistsum_ray.storage.bucket import ask_again, first_line, open_store

if TYPE_CHECKING:  # importing Arrow takes a moment, and a wrong flag should not wait for that
    import pyarrow as pa

Data: TypeAlias = "bytes | pa.Buffer | dict[str, Any]"
"""Content of a file; a dict is written as JSON, which has no infinite numbers and no NaN."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """What is found at a path: a file or, with an empty `e_tag`, something that is none."""

    path: str
    size: int = 0  # bytes
    e_tag: str = ""  # differs where the content does: an object's ETag; on a disk inode, time, size

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Location:
    """A file or folder on a disk, or a key or prefix in a bucket.

    All methods raise StorageError where the storage does not answer or refuses.
    """

    path: str  # absolute path on a disk, or the key in the bucket
    bucket: str = ""  # URI of the bucket or container, such as `s3://bucket`; empty on a disk
    query: str = ""  # options of the URI, such as `region=eu-west-1`

    def __truediv__(self, name: str) -> "Location":
        path = f"{self.path.rstrip('/')}/{name}"
        return self.at(path if self.is_local else path.lstrip("/"))

    @property
    def is_local(self) -> bool:
        return not self.bucket

    @property
    def display(self) -> str:
        """The name in messages and files: an absolute path or a URI."""
        if self.is_local:
            return self.path
        return f"{self.bucket}/{self.path}".rstrip("/") + (f"?{self.query}" if self.query else "")

    @property
    def store(self) -> Any:
        return open_store(self.bucket, self.query)

    def at(self, path: str) -> "Location":
        """Return another path on the same disk or in the same bucket."""
        return replace(self, path=path)

    def lies_in(self, folder: "Location") -> bool:
        """Return whether this is a folder, or below it.

        Links are followed, since two ways to a place may differ in them.
        """
        follow = os.path.realpath if self.is_local else str
        here, above = Path(follow(self.path)), Path(follow(folder.path))
        return self.bucket == folder.bucket and here.is_relative_to(above)

    def file_entry(self) -> Entry | None:
        """Return the file here; None where there is none, or a folder."""
        with self.storage_errors("read"):
            try:
                if self.is_local:
                    path = Path(self.path)
                    return _disk_entry(self.path, path.stat()) if path.is_file() else None
                # Asked for the key "", a store answers for the bucket.
                return _object_entry(self.store.head(self.path)) if self.path else None
            except FileNotFoundError:
                return None

    def is_folder(self) -> bool:
        """Return whether this is a folder, or a prefix of keys."""
        with self.storage_errors("listed"):
            if self.is_local:
                return Path(self.path).is_dir()
            return any(self.store.list(self.path))

    def exists(self) -> bool:
        return self.is_folder() or self.file_entry() is not None

    def read_bytes(self) -> bytes:
        with self.storage_errors("read"):
            if self.is_local:
                return Path(self.path).read_bytes()
            return bytes(self.store.get(self.path).bytes())

    def read_json(self) -> Any:
        """Return the value of a JSON file, or raise ValueError."""
        return json.loads(self.read_bytes())

    def open(self, listed: Entry | None = None) -> Any:
        """Return the file, open for reading at any position.

        ConflictError, here or at a later read: it is not the one that was listed.
        """
        listed = listed or self.file_entry()
        if listed is None:
            raise self._missing()
        if not self.is_local:
            return _ObjectFile(self, listed)
        import pyarrow as pa

        if self.is_folder():  # since it was listed; Arrow's error would look like the disk's
            raise self._conflict()
        with self.storage_errors("read"):
            file = pa.OSFile(self.path)
        if self.file_entry() != listed:  # asked after it was opened: an open file stays what it is
            raise self._conflict()
        return file

    def files(self) -> list[Entry]:
        """Return all files below a folder, sorted by path; none where the folder is missing.

        On a disk links to folders are not followed, and some may be no file: a pipe, or a link
        that leads nowhere.
        """
        with self.storage_errors("listed"):
            if self.is_local:
                return sorted(self._walk()) if Path(self.path).is_dir() else []
            entries = [_object_entry(meta) for page in self.store.list(self.path) for meta in page]
            # An empty object with the name of the folder only marks it: consoles make those.
            return sorted(entry for entry in entries if entry.size or entry.path != self.path)

    def _walk(self) -> Iterator[Entry]:
        def refuse(error: OSError) -> None:
            raise self.at(error.filename).error(error, "listed")

        for folder, _, names in os.walk(self.path, onerror=refuse):
            for name in names:
                path = f"{folder.rstrip('/')}/{name}"
                yield self.at(path).file_entry() or Entry(path)

    def visible_files(self) -> dict[str, Entry]:
        """Return all files below a folder that are not hidden, by their names there."""
        found = {file.path.removeprefix(self.path).lstrip("/"): file for file in self.files()}
        return {name: file for name, file in found.items() if not is_hidden(name)}

    def write(self, data: Data) -> None:
        """Write the whole file, replacing an earlier one."""
        self._put(data, "overwrite")

    def create(self, data: Data) -> None:
        """Write the whole file, but only if there is none; else raise ConflictError.

        After that error the file may be this process's own: a request whose answer is lost is sent
        again.
        """
        self._put(data, "create")

    def _put(self, data: Data, mode: str) -> None:
        if isinstance(data, dict):
            data = (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
        with self.storage_errors("written"):
            if self.is_local:
                _put_on_disk(Path(self.path), data, mode)
            else:
                content = memoryview(data).cast("B")
                ask_again(lambda: self.store.put(self.path, content, mode=mode))

    def delete_files(self, names: Sequence[str]) -> None:
        """Delete files in this folder; missing ones are no error."""

        def delete(name: str) -> None:
            path = (self / name).path
            with suppress(FileNotFoundError):
                if self.is_local:
                    Path(path).unlink()
                else:
                    ask_again(lambda: self.store.delete(path))

        with self.storage_errors("deleted"):
            list(in_threads(self, delete, names))

    def delete(self) -> None:
        """Delete this file; a missing one is no error."""
        folder, _, name = self.path.rpartition("/")
        self.at(folder).delete_files([name])

    @contextmanager
    def storage_errors(self, what: str) -> Iterator[None]:
        """Raise errors of the storage in the block as StorageError: this cannot be `what`."""
        try:
            yield
        except StorageError:
            raise
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileExistsError):
            raise self._conflict() from None
        except (exceptions.BaseError, OSError) as error:
            # If a write finds no file, the bucket is missing.
            if isinstance(error, FileNotFoundError) and what != "written":
                raise self._missing() from None
            raise self.error(error, what) from error
        except BaseException as error:  # so obstore's are, where the address of a store is none
            if type(error).__name__ != "PanicException":
                raise
            advice = "look at the endpoint and the region, in the URI and in the environment"
            cause = first_line(error)
            raise StorageError(f"{self.display}: cannot be {what}: {cause}; {advice}") from None

    def error(self, error: Exception, what: str) -> StorageError:
        """Return the error for a file that the storage did not give or take."""
        cause = getattr(error, "strerror", None) or first_line(error)
        is_gone = getattr(error, "errno", None) in _DISK_IS_GONE or _NO_ANSWER.search(str(error))
        if _KEYS.search(str(error)):
            is_gone = True  # until there are new ones
            cause += "; the keys may have expired, or lack a permission"
        kind = NoAnswerError if is_gone else StorageError
        return kind(f"{self.display}: cannot be {what}: {cause}")

    def _missing(self) -> MissingFileError:
        may_be_elsewhere = self.is_local and "ray" in sys.modules
        shared = ", or not on this node; a local path must be on storage that all nodes share"
        return MissingFileError(
            f"{self.display}: does not exist{shared if may_be_elsewhere else ''}"
        )

    def _conflict(self) -> ConflictError:
        return ConflictError(f"{self.display}: was written by another process")


_DISK_IS_GONE: Final = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""Errors of a network disk that another attempt may not meet."""

_NO_ANSWER: Final = re.compile(r"HTTP error: |status code:? (429|5\d\d)")
"""What obstore says at last of a store that cannot be reached, or is too busy."""


_KEYS: Final = re.compile(r"status code: 401|HEAD .*status code: 40[03]|ExpiredToken")
"""What it says where keys have expired; the answer to HEAD has no text that tells why."""


class _ObjectFile(io.RawIOBase):
    """An object that is open for reading, by requests for ranges of the one that was listed.

    obstore's own reader does not ask for the ETag, and its errors look like those of a bad file.
    """

    def __init__(self, location: Location, listed: Entry) -> None:
        self._location = location
        self._listed = listed
        self._position = 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._listed.size}
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._listed.size)
        count = max(0, end - self._position)
        if count:
            options = {"range": (self._position, end), "if_match": self._listed.e_tag}
            with self._location.storage_errors("read"):
                found = self._location.store.get(self._location.path, options=options)
                buffer[:count] = found.bytes()
        self._position += count
        return count


def _disk_entry(path: str, status: os.stat_result) -> Entry:
    # A file that is replaced has another inode, even where time and size are the same. The inode's
    # own time (ctime) is left out, since the links that `_put_on_disk` makes change it.
    e_tag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return Entry(path, status.st_size, e_tag)


def _object_entry(meta: Any) -> Entry:
    e_tag = meta["e_tag"] or f"{meta['last_modified']} {meta['size']}"
    # Azure leaves the quotes out where it lists.
    return Entry(meta["path"], meta["size"], e_tag if e_tag.endswith('"') else f'"{e_tag}"')


def _put_on_disk(path: Path, data: "bytes | pa.Buffer", mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A killed process leaves this file: readers of Parquet skip hidden names. The name is short,
    # however long the final one is.
    partial = path.with_name(f".mnistsum-partial-{secrets.token_hex(8)}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave a name without its content
        if mode == "create":
            os.link(partial, path)  # fails where there is a file; a rename would replace it
        else:
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # some network disks know no fsync of a folder
        os.fsync(folder)  # for the name
    os.close(folder)


def in_threads(
    folder: Location,
    work: Callable[[Item], Result],
    items: Sequence[Item],
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Apply `work` to each item, which reads below `folder`; yield the results in order."""
    # Object stores are slow, but take many requests at once; a local disk is slowed by threads.
    with ThreadPoolExecutor(1 if folder.is_local else 16) as pool:
        for start in range(0, len(items), 1000):  # `map` would queue a million items at once
            for result in pool.map(work, items[start : start + 1000]):
                yield result
                if on_progress:
                    on_progress(1)


def is_hidden(name: str) -> bool:
    """Return whether readers of Parquet skip this path: a name in it begins with `.` or `_`."""
    return any(component.startswith((".", "_")) for component in name.split("/"))
