"""Which Parquet files `--input` and `--data` name, and the names of these below one folder."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.store import Entry, Location, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

_ODD_CHARACTERS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes that are not UTF-8: neither can be shown."""


class Inputs(NamedTuple):
    """The files that some values name."""

    root: Location  # the deepest folder that contains all folders that are named
    files: dict[str, Entry]  # by name, and sorted by it: relative to `root`
    skipped: list[str]  # paths that are left out, as `report_skipped` says


def list_inputs(
    texts: Sequence[str], output: Location | None = None, flag: str = "--input"
) -> Inputs:
    """List what the values of a flag name: files, folders with all their Parquet files, globs.

    RequestError: a value names nothing; there is no Parquet file; input and output lie in each
    other.
    """
    folders: list[Location] = []
    taken: dict[str, Entry] = {}
    skipped: set[str] = set()
    for text in texts:
        with as_request_error(flag):
            folder, entries = _list(text, output, flag)
        folders.append(folder)
        for entry, is_taken in entries:
            if is_taken:
                taken[entry.path] = entry
            else:
                skipped.add(entry.path)
    if not taken:
        suffixes = ", ".join(SUFFIXES)
        raise RequestError(f"{flag} {' '.join(texts)}: there is no Parquet file ({suffixes})")
    root = _common_root(folders, flag)
    files = {_name(taken[path], root): taken[path] for path in sorted(taken)}
    return Inputs(root, files, sorted(skipped - taken.keys()))


def report_skipped(skipped: list[str], say: Callable[[str], None]) -> None:
    """Say in one line how many files were left out, with an example."""
    if skipped:
        why = "hidden, no Parquet by their suffix, control characters, not UTF-8"
        say(f"skipped: {len(skipped):,}, such as {skipped[0]} ({why})")


def _list(
    text: str, output: Location | None, flag: str
) -> tuple[Location, list[tuple[Entry, bool]]]:
    """Return the folder that a value of the flag names, its files, and whether each is taken."""
    place = locate_existing(text, flag)
    if place.is_folder():
        folder, places = place, [place]
    elif file := place.file_entry():
        _check_apart([place], output)
        # Not pathlib: an object at the top of a bucket has the parent "", and not ".".
        return place.at(os.path.dirname(place.path)), [(file, True)]  # noqa: PTH120
    else:
        folder, places = _matches(text, place, flag)
    # What `**` matches grows with the output.
    _check_apart([folder] if "**" in text else places, output)
    found = []
    for place in places:
        # A link that a glob matches may lead nowhere.
        for entry in place.files() or [place.file_entry() or Entry(place.path)]:
            name = _name(entry, folder)
            is_odd = is_hidden(name) or _ODD_CHARACTERS.search(name)
            found.append((entry, name.lower().endswith(SUFFIXES) and not is_odd))
    return folder, found


def _matches(text: str, place: Location, flag: str) -> tuple[Location, list[Location]]:
    """Return the folder before the first wildcard of a local glob, and what matches there."""
    wild = re.search(r"[^/]*[*?\[].*", text, re.DOTALL)
    if not wild or not place.is_local:
        hint = "" if place.is_local else "; globs are for local paths"
        raise RequestError(
            f"{flag} {text}: there is no such file or folder ({place.display}){hint}"
        )
    folder = locate_existing(text[: wild.start()] or ".", flag)
    # Here `**` does not follow links, which may form a circle.
    return folder, [folder.at(str(path)) for path in Path(folder.path).glob(wild[0])]


def _name(entry: Entry, folder: Location) -> str:
    return entry.path.removeprefix(folder.path).lstrip("/")


def _common_root(folders: list[Location], flag: str) -> Location:
    """Return the deepest folder that contains all folders."""
    if len({(folder.bucket, folder.query) for folder in folders}) > 1:
        reason = "the files have no disk or bucket in common"
        raise RequestError(f"{flag}: {reason}; score them one after the other")
    return folders[0].at(os.path.commonpath([folder.path for folder in folders]))


def _check_apart(places: list[Location], output: Location | None) -> None:
    """Check that no later run takes output for input, and that no input is in the output folder."""
    for place in places:
        if output and (output.lies_in(place) or place.lies_in(output)):
            reason = f"lies in the input {place.display}, or holds it, and would be scored"
            raise RequestError(f"--output {output.display}: {reason}; put it elsewhere")
