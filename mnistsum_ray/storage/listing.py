"""Which files lie in a folder or match a glob, each once, whatever links lead to it.

Arrow's own listing follows links: one to a parent folder lists every file some forty times, and one to a neighbour twice. And it
lists everything below a folder, where a glob such as `/*/x` asks for little of it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from mnistsum_ray.storage.location import Location, is_utf8

Pattern = tuple[str, ...]
"""The components of a glob."""

DUPLICATE = "a link to what is listed anyway"


@dataclass
class Listing:
    """What was found below one place."""

    files: dict[str, str] = field(default_factory=dict)
    """Path of each file, and where it really lies; both are the same in an object store."""
    links: dict[str, str] = field(default_factory=dict)
    """Path of each link to a folder that was followed, or to nothing, and where it leads."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path and reason of what is no file or is listed under another path."""
    infos: dict[str, pafs.FileInfo] = field(default_factory=dict)
    """Of the files of an object store, whose listing holds them."""

    def file_infos(self, place: Location) -> dict[str, pafs.FileInfo]:
        """Of each file whose name is UTF-8, which Arrow needs."""
        if self.infos or not self.files:
            return self.infos
        paths = [path for path in self.files if is_utf8(path)]
        return dict(zip(paths, place.filesystem.get_file_info(paths), strict=True)) if paths else {}

    def second_names(self) -> list[str]:
        """Paths of files that another path names too; a file's own name comes before a link's."""
        return second_names(self.files)

    def keep(self, wanted: Callable[[str], bool]) -> "Listing":
        """The same with just the files whose paths are wanted; the others are left out for their names."""
        files = {path: real for path, real in self.files.items() if wanted(path)}
        skipped = self.skipped | {path: "its name" for path in self.files if path not in files}
        return Listing(files, self.links, skipped, {path: info for path, info in self.infos.items() if path in files})


def list_folder(place: Location) -> Listing:
    """All files below a folder; links are followed, and each file is listed once.

    Raises:
        OSError: a folder cannot be read.
    """
    if not place.is_local:
        return _of_object_store(place.files())
    listing = Listing()
    linked: list[str] = []
    seen: set[str] = set()
    _walk(place.path, os.path.realpath(place.path), listing, linked, seen)
    while linked:
        link = min(linked)
        linked.remove(link)
        real = os.path.realpath(link)
        if real in seen or _is_below(os.path.realpath(link.rpartition("/")[0]), real):
            listing.skipped[link] = DUPLICATE
        else:
            listing.links[link] = real
            _walk(link, real, listing, linked, seen)
    return listing


def list_glob(place: Location, pattern: Pattern) -> Listing:
    """The files below a place that match, by looking into just the folders that can hold some; `**` follows no links.

    Raises:
        OSError: the place cannot be read.
    """
    if not place.is_local:
        return _of_object_store([info for info in place.files() if matches(parts_below(info.path, place.path) or (), pattern)])
    listing = Listing()
    for path in _glob(place.path, pattern, listing):
        listing.files[path] = os.path.realpath(path)
    return listing


def list_file(place: Location) -> Listing:
    """One file that is there."""
    return Listing({place.path: os.path.realpath(place.path)}) if place.is_local else _of_object_store([place.info()])


def _of_object_store(found: list[pafs.FileInfo]) -> Listing:
    return Listing(files={info.path: info.path for info in found}, infos={info.path: info for info in found})


def _walk(folder: str, real: str, listing: Listing, linked: list[str], seen: set[str]) -> None:
    """Add the files of a folder and of the folders below it; `linked` gets the links to folders, to be followed last."""
    folders = [(folder, real)]
    while folders:
        here, real_here = folders.pop()
        if real_here in seen:
            listing.skipped[here] = DUPLICATE
            continue
        seen.add(real_here)
        for entry in _entries(here):
            if entry.is_dir(follow_symlinks=False) and entry.name.startswith((".", "_")):
                listing.skipped[entry.path] = "its name"  # a link to it may have another
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{real_here.rstrip('/')}/{entry.name}"))
            elif entry.is_file(follow_symlinks=False):
                listing.files[entry.path] = f"{real_here.rstrip('/')}/{entry.name}"
            elif not entry.is_symlink():
                listing.skipped[entry.path] = "neither a file nor a folder"
            elif _leads_to_folder(entry):
                linked.append(entry.path)
            elif _leads_to_file(entry):
                listing.files[entry.path] = os.path.realpath(entry.path)
            else:
                listing.links[entry.path] = os.path.realpath(entry.path)
                listing.skipped[entry.path] = "a link that leads nowhere"


def _glob(folder: str, pattern: Pattern, listing: Listing) -> Iterator[str]:
    first, rest = pattern[0], pattern[1:]
    if first == "**" and rest:
        yield from _glob(folder, rest, listing)
    for entry in _entries(folder):
        if first == "**":
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _glob_if_readable(entry.path, pattern, listing)
            elif not rest and _leads_to_file(entry) and not entry.name.startswith("."):
                yield entry.path
        elif _matches_one(entry.name, first):
            if not rest and _leads_to_file(entry):
                yield entry.path
            elif rest and _leads_to_folder(entry):
                if entry.is_symlink():
                    listing.links[entry.path] = os.path.realpath(entry.path)
                yield from _glob_if_readable(entry.path, rest, listing)


def _glob_if_readable(folder: str, pattern: Pattern, listing: Listing) -> Iterator[str]:
    """As a shell, which passes over folders that it may not read; here this is said."""
    try:
        yield from _glob(folder, pattern, listing)
    except PermissionError:
        listing.skipped[folder] = "a folder that cannot be read"


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _leads_to_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def matches(parts: tuple[str, ...], pattern: Pattern) -> bool:
    """Whether a path matches as in a shell: `**` matches any number of folders, no wildcard a leading dot."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        skipped = next((index for index, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(matches(parts[skip:], pattern[1:]) for skip in range(skipped + 1))
    return bool(parts) and _matches_one(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _matches_one(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


def parts_below(path: str, folder: str) -> tuple[str, ...] | None:
    """The components of a path below a folder, () for the folder itself, None where it is not below it."""
    if path == folder:
        return ()
    return PurePosixPath(path[len(folder) :].lstrip("/")).parts if path.startswith(folder.rstrip("/") + "/") else None


def _is_below(path: str, folder: str) -> bool:
    return parts_below(path, folder) is not None


def second_names(files: dict[str, str]) -> list[str]:
    """Of paths and where the files really lie: the paths of files that another path names too."""
    first: dict[str, str] = {}
    for path, real in sorted(files.items(), key=lambda item: (item[0] != item[1], item[0])):
        first.setdefault(real, path)
    return [path for path, real in files.items() if first[real] != path]


def in_utf8(path: str) -> str:
    """A path to show and to write down: bytes that are not UTF-8 are escaped, such as \\udcff."""
    return path.encode("utf-8", "backslashreplace").decode()


def report_skipped(skipped: dict[str, str], say: Callable[[str], None]) -> None:
    """One line for each reason, with an example."""
    by_reason: dict[str, list[str]] = {}
    for path, why in skipped.items():
        by_reason.setdefault(why, []).append(path)
    for why, paths in by_reason.items():
        said = "for their names" if why == "its name" else f"since each is {why}"
        say(f"left out {said}: {len(paths):,}, such as {in_utf8(min(paths))}")
