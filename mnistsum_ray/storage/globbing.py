"""List the files that match a glob, by reading only the folders that can hold a match.

Arrow lists everything below a folder first: for `/*/name.parquet` that is the whole disk.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase

from mnistsum_ray.storage.listing import (
    Listing,
    leads_to_file,
    leads_to_folder,
    listing_of_objects,
    relative_parts,
    sorted_entries,
)
from mnistsum_ray.storage.location import Location

Pattern = tuple[str, ...]
"""The components of a glob."""


def list_glob(location: Location, pattern: Pattern) -> Listing:
    """Files below a location that match a glob; `**` does not follow links.

    Raises:
        OSError: the location cannot be read.
    """
    if not location.is_local:
        infos = location.files()
        return listing_of_objects([info for info in infos if matches(relative_parts(info.path, location.path) or (), pattern)])
    listing = Listing()
    for path in _glob(location.path, pattern, listing):
        listing.files[path] = os.path.realpath(path)
    return listing


def matches(parts: tuple[str, ...], pattern: Pattern) -> bool:
    """True if a path matches as in a shell: `**` matches any number of folders, no wildcard matches a leading dot."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        visible = next((index for index, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(matches(parts[skip:], pattern[1:]) for skip in range(visible + 1))
    return bool(parts) and _matches_one(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _matches_one(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.startswith(".") <= pattern.startswith(".")


def _glob(folder: str, pattern: Pattern, listing: Listing) -> Iterator[str]:
    first, rest = pattern[0], pattern[1:]
    if first == "**" and rest:
        yield from _glob(folder, rest, listing)
    for entry in sorted_entries(folder):
        if first == "**":
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _glob_if_readable(entry.path, pattern, listing)
            elif not rest and leads_to_file(entry) and not entry.name.startswith("."):
                yield entry.path
        elif _matches_one(entry.name, first):
            if not rest and leads_to_file(entry):
                yield entry.path
            elif rest and leads_to_folder(entry):
                if entry.is_symlink():
                    listing.links[entry.path] = os.path.realpath(entry.path)
                yield from _glob_if_readable(entry.path, rest, listing)


def _glob_if_readable(folder: str, pattern: Pattern, listing: Listing) -> Iterator[str]:
    """As `_glob`, but an unreadable folder is recorded as skipped; a shell passes over it silently."""
    try:
        yield from _glob(folder, pattern, listing)
    except PermissionError:
        listing.skipped[folder] = "a folder that cannot be read"
