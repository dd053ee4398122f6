"""List the files of a folder or of a glob.

Links to folders are not followed below the place that is listed, so that every listing ends. Local files are listed here and not
by Arrow, which follows links and lists everything below a folder first: for `/*/name.parquet` the whole disk.
"""

import os
import stat
from collections.abc import Callable
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


def list_folder(location: Location, pattern: Pattern | None = None) -> Listing:
    """All files below a folder but for those of hidden folders, or the files there that match a glob as in a shell.

    Raises:
        OSError: a folder cannot be read. A glob skips folders that this user may not read.
    """
    if not location.is_local:
        infos = location.files()
        if pattern is not None:
            infos = [info for info in infos if matches(relative_parts(info.path, location.path) or (), pattern)]
        return _listing_of_objects(location, infos)
    listing = Listing()
    folders: list[tuple[str, tuple[str, ...]]] = [(location.path, ())]
    while folders:
        folder, above = folders.pop()
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except PermissionError:
            if pattern is None:
                raise
            listing.skipped[folder] = "a folder that cannot be read"
            continue
        for entry in entries:
            parts = (*above, entry.name)
            descend = not is_hidden(entry.name) if pattern is None else matches(parts, pattern, below=True)
            if entry.is_dir(follow_symlinks=False):
                if descend:
                    folders.append((entry.path, parts))
                elif pattern is None:
                    listing.skipped[entry.path] = _NAME
            elif pattern is None or matches(parts, pattern) or (descend and entry.is_dir()):
                listing.add(entry.path)
    return listing


def list_file(location: Location) -> Listing:
    """One file that exists."""
    if not location.is_local:
        return _listing_of_objects(location, [location.info()])
    listing = Listing()
    listing.add(location.path)
    return listing


def matches(parts: tuple[str, ...], pattern: Pattern, *, below: bool = False) -> bool:
    """True if a path matches as in a shell: `**` matches any number of folders, no wildcard matches a leading dot.

    Args:
        below: whether the path is that of a folder, and something below it must be able to match.
    """
    if not pattern:
        return not parts and not below
    if pattern[0] == "**":
        visible = next((index for index, part in enumerate(parts) if part.startswith(".")), len(parts))
        if below and visible == len(parts):
            return True
        return any(matches(parts[skip:], pattern[1:], below=below) for skip in range(visible + 1))
    if not parts:
        return below
    dots = parts[0].startswith(".") <= pattern[0].startswith(".")
    return dots and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:], below=below)


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
