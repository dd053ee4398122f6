"""The folder that a command writes to: the only way to write or delete files in a run or output folder.

On a disk a file appears under its name when it is complete; an object appears whole or not at all.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyarrow as pa

from mnistsum_ray.errors import ExistingFileError, RequestError
from mnistsum_ray.storage import object_store
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate, output_base_folder, refused

if TYPE_CHECKING:
    from mnistsum_ray.storage.lock import FolderLock

PARTIAL: Final = ".mnistsum-partial-"
"""Beginning of the name of an unfinished file, which is short whatever the final name is."""

Data: TypeAlias = "bytes | pa.Buffer | dict[str, Any]"
"""Content of a file; a dict is written as JSON, which lacks infinite numbers and NaN: ValueError."""


@dataclass(frozen=True)
class OutputFolder:
    """A folder that this process may write to; `folder_lock` and `empty_output` make it.

    RunError: another run has taken it, which every method checks first. StorageError: as of Location.
    """

    place: Location
    lock: "FolderLock | None"
    """None: the folder was empty when the command began."""

    def __truediv__(self, name: str) -> "OutputFolder":
        return replace(self, place=self.place / name)

    def check(self) -> None:
        """Check that this run still holds the folder."""
        if self.lock:
            self.lock.check()

    def write(self, name: str, data: Data) -> None:
        """Write a whole file, in place of the one that is there."""
        self.check()
        place = self.place / name
        data = _encoded(data)
        with place.answers("written"):
            if place.is_local:
                _write_to_disk(Path(place.path), data)
            else:
                with place.filesystem.open_output_stream(place.path) as stream:
                    stream.write(data)

    def create(self, name: str, data: Data) -> None:
        """Write a whole file, but only if there is none; else raise ExistingFileError.

        In an object store the write itself is conditional; on a disk the lock keeps others away.
        """
        place = self.place / name
        if not place.is_local:
            self.check()
            object_store.put(place.filesystem, place.path, bytes(_encoded(data)))
        elif place.exists():
            raise ExistingFileError(f"{place.display}: exists")
        else:
            self.write(name, data)

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is no error."""
        self.delete_files([name])

    def delete_files(self, names: Sequence[str], on_progress: Callable[[int], None] = lambda _: None) -> None:
        """Delete files; missing ones are no error. `on_progress` gets numbers of files."""
        for start in range(0, len(names), object_store.MAX_DELETED):
            self.check()
            chunk = names[start : start + object_store.MAX_DELETED]
            paths = [(self.place / name).path for name in chunk]
            with self.place.answers("deleted"):
                object_store.delete(self.place.filesystem, paths)
            on_progress(len(paths))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with its files; a missing one is no error."""
        self.check()
        place = self.place / name
        if place.exists():
            with place.answers("deleted"):
                place.filesystem.delete_dir(place.path)


def empty_output(text: str) -> OutputFolder:
    """Resolve `--output` of a command that writes only into an empty folder."""
    output = locate(text, "--output", output_base_folder())
    with refused("--output"):
        if output.files():
            raise RequestError(f"--output {output.display}: is not empty; name another folder")
    return OutputFolder(output, None)


def _encoded(data: Data) -> bytes | pa.Buffer:
    if isinstance(data, dict):
        return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
    return data


def _write_to_disk(path: Path, data: bytes | pa.Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
