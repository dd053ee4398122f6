"""List the files of a folder, each once, however many links lead to it.

Arrow's own listing follows links: a link to a parent folder lists every file about forty times, a link to a neighbour twice.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from mnistsum_ray.storage.location import Location, is_utf8

DUPLICATE = "a link to a file or folder that is listed anyway"
_NAME = "its name"


@dataclass
class Listing:
    """Files found below one location."""

    files: dict[str, str] = field(default_factory=dict)
    """Path -> path with all links resolved; the two are the same in an object store."""
    links: dict[str, str] = field(default_factory=dict)
    """Path -> target of each link to a folder that was followed, and of each broken link."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path -> reason of each entry that is no file, or that is listed under another path."""
    object_infos: dict[str, pafs.FileInfo] = field(default_factory=dict)
    """Path -> file info in an object store, whose listing contains it; empty on a disk."""

    def file_infos(self, location: Location) -> dict[str, pafs.FileInfo]:
        """Path -> file info, without files whose names are not UTF-8: Arrow cannot open these."""
        if self.object_infos or not self.files:
            return self.object_infos
        paths = [path for path in self.files if is_utf8(path)]
        return dict(zip(paths, location.filesystem.get_file_info(paths), strict=True)) if paths else {}

    def duplicates(self) -> list[str]:
        """Paths of files that are also listed under another path."""
        return duplicate_paths(self.files)

    def filter(self, wanted: Callable[[str], bool]) -> "Listing":
        """The listing with only the files whose paths are wanted; the others become skipped for their names."""
        files = {path: real for path, real in self.files.items() if wanted(path)}
        skipped = self.skipped | {path: _NAME for path in self.files if path not in files}
        return Listing(files, self.links, skipped, {path: info for path, info in self.object_infos.items() if path in files})


def list_folder(location: Location) -> Listing:
    """All files below a folder. Links are followed, and each file is listed once.

    Raises:
        OSError: a folder cannot be read.
    """
    if not location.is_local:
        return listing_of_objects(location.files())
    listing = Listing()
    pending_links: list[str] = []
    visited: set[str] = set()
    _walk(location.path, os.path.realpath(location.path), listing, pending_links, visited)
    # Links come last, so that a file is listed under its own path where it has one below the folder.
    while pending_links:
        link = min(pending_links)
        pending_links.remove(link)
        real = os.path.realpath(link)
        if real in visited or relative_parts(os.path.realpath(link.rpartition("/")[0]), real) is not None:
            listing.skipped[link] = DUPLICATE
        else:
            listing.links[link] = real
            _walk(link, real, listing, pending_links, visited)
    return listing


def list_file(location: Location) -> Listing:
    """One file that exists."""
    if location.is_local:
        return Listing({location.path: os.path.realpath(location.path)})
    return listing_of_objects([location.info()])


def listing_of_objects(infos: list[pafs.FileInfo]) -> Listing:
    """Listing of files in an object store, which has no links."""
    return Listing(files={info.path: info.path for info in infos}, object_infos={info.path: info for info in infos})


def _walk(folder: str, real: str, listing: Listing, pending_links: list[str], visited: set[str]) -> None:
    """Add the files of a folder and its subfolders to `listing`, and links to folders to `pending_links`.

    Args:
        real: the folder with all links resolved.
        visited: resolved folders that were walked already.
    """
    folders = [(folder, real)]
    while folders:
        here, real_here = folders.pop()
        if real_here in visited:
            listing.skipped[here] = DUPLICATE
            continue
        visited.add(real_here)
        for entry in sorted_entries(here):
            if entry.is_dir(follow_symlinks=False) and entry.name.startswith((".", "_")):
                listing.skipped[entry.path] = _NAME  # a link to it may have another name
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{real_here.rstrip('/')}/{entry.name}"))
            elif entry.is_file(follow_symlinks=False):
                listing.files[entry.path] = f"{real_here.rstrip('/')}/{entry.name}"
            elif not entry.is_symlink():
                listing.skipped[entry.path] = "neither a file nor a folder"
            elif leads_to_folder(entry):
                pending_links.append(entry.path)
            elif leads_to_file(entry):
                listing.files[entry.path] = os.path.realpath(entry.path)
            else:
                listing.links[entry.path] = os.path.realpath(entry.path)
                listing.skipped[entry.path] = "a link that leads nowhere"


def sorted_entries(folder: str) -> list["os.DirEntry[str]"]:
    """Entries of a folder, sorted by name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    """True for a folder and for a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def leads_to_file(entry: "os.DirEntry[str]") -> bool:
    """True for a file and for a link to one."""
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def relative_parts(path: str, folder: str) -> tuple[str, ...] | None:
    """Components of a path relative to a folder: () for the folder itself, None for a path outside of it."""
    if path == folder:
        return ()
    return PurePosixPath(path[len(folder) :].lstrip("/")).parts if path.startswith(folder.rstrip("/") + "/") else None


def duplicate_paths(files: dict[str, str]) -> list[str]:
    """Paths of files that are also listed under another path.

    The path that is kept is the file's own path where that is listed, else the first in alphabetical order.

    Args:
        files: path -> path with all links resolved.
    """
    kept: dict[str, str] = {}
    for path, real in sorted(files.items(), key=lambda item: (item[0] != item[1], item[0])):
        kept.setdefault(real, path)
    return [path for path, real in files.items() if kept[real] != path]


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
