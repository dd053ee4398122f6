"""A Location as Arrow, Ray Data and Ray Train name it: a file system and a path, or a URI."""

from functools import cache
from typing import Any
from urllib.parse import quote

from pyarrow.fs import FileSystem, LocalFileSystem  # noqa: TID251 - Ray reads and writes by it

from mnistsum_ray.storage.store import Location


def arrow_uri(location: Location) -> str:
    """An absolute path, or a URI in which Arrow decodes percent signs."""
    return location.path if location.is_local else location.at(quote(location.path)).display


def arrow_place(location: Location) -> tuple[Any, str]:
    """The file system of Arrow, and the path in it. Keys come from the environment."""
    if location.is_local:
        return LocalFileSystem(), location.path
    file_system, bucket = _open_bucket(arrow_uri(location.at("")))
    return file_system, f"{bucket}/{location.path}"


@cache
def _open_bucket(uri: str) -> tuple[Any, str]:
    file_system, path = FileSystem.from_uri(uri)
    return file_system, path.rstrip("/")
