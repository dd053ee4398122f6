"""Paths and URIs of the command line, resolved to a Location."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs  # noqa: TID251

from mnistsum_ray.errors import RequestError, StorageError, one_line
from mnistsum_ray.storage import object_store
from mnistsum_ray.storage.location import Location, is_utf8
from mnistsum_ray.storage.uri import KEYS_REFUSED, may_hold_keys


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a path or URI, or raise RequestError; a relative path starts at `base` or at the working folder."""
    if may_hold_keys(text):
        raise RequestError(f"{flag}: {KEYS_REFUSED}")
    if "\0" in text or not is_utf8(text):
        raise RequestError(f"{flag} {text}: holds characters that no path can have; write it as UTF-8, without NUL")
    if "://" in text:
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise RequestError(f"{flag} {text}: {one_line(error)}") from None
        key = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
        if key and filesystem.type_name == "abfs":  # the one that Arrow does not read
            filesystem = pafs.AzureFileSystem(**object_store.options_of(filesystem) | {"account_key": key})
        return Location(filesystem, path.rstrip("/"), text)
    try:
        path = os.path.normpath((base or Path.cwd()) / Path(text).expanduser())
    except RuntimeError:
        raise RequestError(f"{flag} {text}: there is no home folder of that name") from None
    return Location(pafs.LocalFileSystem(), path, path)


def locate_existing(text: str, flag: str) -> Location:
    """Resolve a path to read from: relative to the working folder, else to where a submitted job writes."""
    here = locate(text, flag)
    with refused(flag):
        return here if here.exists() else locate(text, flag, output_base_folder())


@contextmanager
def refused(flag: str) -> Iterator[None]:
    """Raise a StorageError of the block as RequestError that names a flag."""
    try:
        yield
    except StorageError as error:
        raise RequestError(f"{flag} {error}") from None


def output_base_folder() -> Path:
    """Folder that relative output paths start from: the working folder, or that of a job's user.

    `ray job submit --working-dir` runs the driver in a temporary copy of the working folder, in a
    folder of this name, which Ray then deletes. tests/storage/test_paths.py fails when Ray changes it.
    """
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here
