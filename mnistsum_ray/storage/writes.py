"""Writes, moves and deletes of files. Only `lock.OutputFolder` calls them, which asks first whether the folder may be written.

On a disk a file appears under its name when it is complete, also if the power fails; an object appears whole or not at all.
"""

import contextlib
import os
import secrets
from pathlib import Path

import pyarrow as pa

from mnistsum_ray.errors import ExistingFileError
from mnistsum_ray.storage import object_store
from mnistsum_ray.storage.location import Location


def write(place: Location, data: bytes | pa.Buffer) -> None:
    """Write a whole file, in place of the one that is there."""
    with place.answers("written"):
        if not place.is_local:
            with place.filesystem.open_output_stream(place.path) as stream:
                stream.write(data)
            return
        folder = Path(place.path).parent
        _make_folder(folder)
        partial = folder / f".mnistsum-{secrets.token_hex(8)}.partial"
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(place.path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        _sync_folder(folder)


def create(place: Location, data: bytes | pa.Buffer) -> None:
    """Write a whole file, but only if there is none; else raise ExistingFileError.

    In an object store the write itself is conditional. On a disk the lock of the folder keeps other runs away.
    """
    with place.answers("written"):
        if not place.is_local:
            object_store.put(place.filesystem, place.path, bytes(data))
        elif Path(place.path).exists():
            raise ExistingFileError(f"{place.display}: exists")
        else:
            write(place, data)


def move(place: Location, target: Location) -> None:
    """Move a file to another path on the same file system, whose folder is made where it is missing."""
    with place.answers("moved"):
        if not place.is_local:  # Arrow's own `move` lacks Azure accounts without hierarchical namespace
            place.filesystem.copy_file(place.path, target.path)
            place.filesystem.delete_file(place.path)
            return
        folder = Path(target.path).parent
        _make_folder(folder)
        Path(place.path).rename(target.path)
        _sync_folder(folder)


def delete(place: Location) -> None:
    """Delete a file; a missing one is no error."""
    with place.answers("deleted"), contextlib.suppress(FileNotFoundError):
        place.filesystem.delete_file(place.path)


def delete_folder(place: Location) -> None:
    """Delete a folder and all that is in it; a missing one is no error. In an object store it is gone with its last file."""
    with place.answers("deleted"), contextlib.suppress(FileNotFoundError):
        place.filesystem.delete_dir(place.path)


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
