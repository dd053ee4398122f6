"""Which Parquet files `--input` and `--data` name, and the names of these below one folder."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.store import Entry, Location, is_hidden
from mnistsum_ray.storage.uri import ODD_CHARACTERS, as_request_error, locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""


class Inputs(NamedTuple):
    """The files that some values name."""

    root: Location  # the deepest folder that contains all folders that are named
    files: dict[str, Entry]  # by name, and sorted by it: relative to `root`
    skipped: list[str]  # paths that are left out, as `report_skipped` says


def list_inputs(
    texts: Sequence[str],
    output: Location | None = None,
    flag: str = "--input",
    if_none: str = "there is no Parquet file",
) -> Inputs:
    """List what the values of a flag name: files, folders with all their Parquet files, globs.

    RequestError: a value names nothing; there is no Parquet file (`if_none` is the message); input
    and output lie in each other.
    """
    found: dict[str, Entry | None] = {}
    folders = []
    for text in texts:
        folder, listed = _list(text, output, flag)
        folders.append(folder)
        for path, file in listed.items():
            found[path] = found.get(path) or file  # None: left out by all values
    root = _common_root(folders, flag)
    files = {_name(path, root): file for path, file in found.items() if file}
    if not files:
        raise RequestError(f"{flag} {' '.join(texts)}: {if_none} ({', '.join(SUFFIXES)})")
    skipped = sorted(path for path, file in found.items() if not file)
    return Inputs(root, dict(sorted(files.items())), skipped)


def report_skipped(skipped: list[str], say: Callable[[str], None]) -> None:
    """Say in one line how many paths were left out, with an example."""
    if skipped:
        why = "hidden, no Parquet by their suffix, links to folders, control characters, not UTF-8"
        say(f"left out: {len(skipped):,}, such as {skipped[0]} ({why})")


def _list(
    text: str, output: Location | None, flag: str
) -> tuple[Location, dict[str, Entry | None]]:
    """The folder that a value of the flag names, and what it names there; None is left out."""
    place = locate_existing(text, flag)
    wild = re.search(r"[^/]*[*?\[].*", text if place.is_local else place.path, re.DOTALL)
    with as_request_error(flag):
        if place.is_folder():
            folder, places = place, [place]
        elif file := place.file_entry():
            _check_apart([place], output)
            # Not pathlib: an object at the top of a bucket has the parent "", and not ".".
            return place.at(os.path.dirname(place.path)), {place.path: file}  # noqa: PTH120
        elif wild and place.is_local:
            folder = locate_existing(text[: wild.start()] or ".", flag)
            places = _matches(folder, wild[0])
        else:
            problem = f"there is no such file or folder ({place.display})"
            if wild:
                problem = "names a folder or a file; globs are for local paths"
            raise RequestError(f"{flag} {text}: {problem}")
        # What `**` matches grows with the output.
        _check_apart([folder] if wild and "**" in wild[0] else places, output)
        entries = list(chain.from_iterable(map(_entries, places)))
    if folder.is_local:
        # By links a glob may come to a folder in many ways, which may form a circle.
        entries.sort(key=lambda entry: (len(entry.path), entry.path), reverse=True)
        real = cache(os.path.realpath)
        entries = list({(real(Path(one.path).parent), one.name): one for one in entries}.values())
    return folder, {one.path: one if _is_data(_name(one.path, folder)) else None for one in entries}


def _is_data(name: str) -> bool:
    """Whether a file that a folder or a glob has brought is taken."""
    is_odd = is_hidden(name) or ODD_CHARACTERS.search(name)
    return name.lower().endswith(SUFFIXES) and not is_odd


def _matches(folder: Location, pattern: str) -> list[Location]:
    """The files and folders on a disk that match a glob below a folder."""
    find = partial(glob.glob, root_dir=folder.path, recursive=True)
    with folder.storage_errors("listed"):
        for above in Path(pattern).parents:
            for name in find(f"{above}/"):  # in which glob takes unreadable folders for empty
                os.scandir(f"{folder.path}/{name}").close()
        return [folder / name.rstrip("/") for name in find(pattern)]


def _entries(place: Location) -> list[Entry]:
    """All below a folder but what is in hidden folders, or the file itself."""
    if place.is_folder():
        return place.listing(lambda folder: not is_hidden(Path(folder).name))
    return [place.file_entry() or Entry(place.path)]  # a link may lead nowhere


def _name(path: str, folder: Location) -> str:
    return path.removeprefix(folder.path).lstrip("/")


def _common_root(folders: list[Location], flag: str) -> Location:
    """The deepest folder that contains all folders."""
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
