"""List the files of a folder or of a glob, each once.

Links to folders are not followed below the place that is listed, so that every listing ends. A local glob is listed here and not
by Arrow, which lists everything below a folder first: for `/*/name.parquet` the whole disk.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import pyarrow.fs as pafs

from mnistsum_ray.storage.location import Location

DUPLICATE: Final = "a link to a file that is listed anyway"
_NAME: Final = "its name"

Pattern = tuple[str, ...]
"""The components of a glob."""


class FileEntry(NamedTuple):
    """A file that was listed."""

    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970, see `Location.modified`."""
    real: str
    """The path with all links resolved."""


@dataclass
class Listing:
    """Files found below one location, and what was left out."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    """By path."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path -> reason."""

    def filter(self, wanted: Callable[[str], bool]) -> "Listing":
        """The listing with only the files whose paths are wanted; the others become skipped for their names."""
        files = {path: entry for path, entry in self.files.items() if wanted(path)}
        return Listing(files, self.skipped | {path: _NAME for path in self.files if path not in files})

    def add(self, path: str) -> None:
        """Add a local file; what is none becomes skipped."""
        try:
            status = Path(path).stat()
        except OSError:  # it does not exist, or its links lead in a circle
            self.skipped[path] = "a link that leads nowhere"
            return
        prefix = "a link to " if Path(path).is_symlink() else ""
        if stat.S_ISREG(status.st_mode):
            self.files[path] = FileEntry(status.st_size, status.st_mtime_ns, os.path.realpath(path))
        elif stat.S_ISDIR(status.st_mode):
            self.skipped[path] = f"{prefix}a folder"
        else:
            self.skipped[path] = prefix + _special_file(status.st_mode)


def is_hidden(name: str) -> bool:
    """True if readers of Parquet skip a file of this name, since it, or a folder of it, begins with `.` or `_`."""
    return any(component.startswith((".", "_")) for component in name.split("/"))


def list_folder(location: Location) -> Listing:
    """All files below a folder, but for hidden folders and links to folders.

    Raises:
        OSError: a folder cannot be read.
    """
    if not location.is_local:
        return _listing_of_objects(location, location.files())
    listing, folders = Listing(), [location.path]
    while folders:
        for entry in _entries(folders.pop()):
            if not entry.is_dir(follow_symlinks=False):
                listing.add(entry.path)
            elif is_hidden(entry.name):
                listing.skipped[entry.path] = _NAME
            else:
                folders.append(entry.path)
    return listing


def list_file(location: Location) -> Listing:
    """One file that exists."""
    if not location.is_local:
        return _listing_of_objects(location, [location.info()])
    listing = Listing()
    listing.add(location.path)
    return listing


def list_glob(location: Location, pattern: Pattern) -> Listing:
    """Files below a location that match a glob as in a shell, but through no link to a folder.

    Raises:
        OSError: the location cannot be read.
    """
    if not location.is_local:
        infos = location.files()
        return _listing_of_objects(
            location, [info for info in infos if matches(relative_parts(info.path, location.path) or (), pattern)]
        )
    listing = Listing()
    for path in _glob(location.path, pattern, listing):
        listing.add(path)
    return listing


def matches(parts: tuple[str, ...], pattern: Pattern) -> bool:
    """True if a path matches as in a shell: `**` matches any number of folders, no wildcard matches a leading dot."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        visible = next((index for index, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(matches(parts[skip:], pattern[1:]) for skip in range(visible + 1))
    return bool(parts) and _matches_one(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def relative_parts(path: str, folder: str) -> tuple[str, ...] | None:
    """Components of a path relative to a folder: () for the folder itself, None for a path outside of it."""
    if path == folder:
        return ()
    return PurePosixPath(path[len(folder) :].lstrip("/")).parts if path.startswith(folder.rstrip("/") + "/") else None


def duplicate_paths(files: dict[str, FileEntry]) -> list[str]:
    """Paths of files that are also listed under another path: a file's own path is kept, else the first in the alphabet."""
    kept: dict[str, str] = {}
    for path, entry in sorted(files.items(), key=lambda item: (item[0] != item[1].real, item[0])):
        kept.setdefault(entry.real, path)
    return [path for path, entry in files.items() if kept[entry.real] != path]


def escape_non_utf8(path: str) -> str:
    r"""A path for messages and files: bytes that are not UTF-8 are escaped, such as \udcff."""
    return path.encode("utf-8", "backslashreplace").decode()


def report_skipped(skipped: dict[str, str], say: Callable[[str], None]) -> None:
    """Say one line for each reason, with the number of paths and an example."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        because = "for their names" if reason == _NAME else f"since each is {reason}"
        say(f"left out {because}: {len(paths):,}, such as {escape_non_utf8(min(paths))}")


def special_file_error(location: Location) -> str | None:
    """Why something that exists can be neither read nor listed; None for a file, a folder, and what does not exist."""
    if not location.is_local or location.info().type != pafs.FileType.Unknown:
        return None
    return f"is {_special_file(Path(location.path).stat().st_mode)}"


def _special_file(mode: int) -> str:
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "a pipe or a socket, not a regular file"


def _listing_of_objects(location: Location, infos: list[pafs.FileInfo]) -> Listing:
    return Listing({info.path: FileEntry(info.size, location.modified(info), info.path) for info in infos})


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _matches_one(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


def _glob(folder: str, pattern: Pattern, listing: Listing) -> Iterator[str]:
    """Paths that match; links to folders and folders that cannot be read become skipped."""
    first, rest = pattern[0], pattern[1:]
    try:
        entries = _entries(folder)
    except PermissionError:
        listing.skipped[folder] = "a folder that cannot be read"
        return
    if first == "**" and rest:
        yield from _glob(folder, rest, listing)
    for entry in entries:
        if not _matches_one(entry.name, "*" if first == "**" else first):
            continue
        if entry.is_dir(follow_symlinks=False):
            below = pattern if first == "**" else rest
            yield from _glob(entry.path, below, listing) if below else ()
        elif not rest or Path(entry.path).is_dir():  # a link to a folder becomes skipped
            yield entry.path
