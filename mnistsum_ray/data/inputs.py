"""Input files: which Parquet files `--input` and `--data` name, and their names below one folder.

A glob means the same on a disk and in an object store: files are listed, and their names matched.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from mnistsum_ray.errors import RequestError, printable
from mnistsum_ray.storage.store import Entry, Location, is_hidden
from mnistsum_ray.storage.uri import ODD_CHARACTERS, as_request_error, locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

_DELTA_LOG: Final = "_delta_log"
"""Folder in a table of Delta Lake with its log, which says which files are still part of it."""


class Inputs(NamedTuple):
    """The files that some values name."""

    root: Location  # the deepest folder that contains all files
    files: dict[str, Entry]  # by name, and sorted by it: relative to `root`, `printable`
    skipped: list[str]  # paths that are left out, as `report_skipped` says


def list_inputs(
    texts: Sequence[str],
    output: Location | None = None,
    flag: str = "--input",
    if_none: str = "there is no Parquet file",
) -> Inputs:
    """List what the values of a flag name: files, globs, and folders with all their Parquet files.

    RequestError: a value names nothing, or a table of Delta Lake; there is no Parquet file
    (`if_none` is the message); input and output lie in each other.
    """
    found: dict[str, Entry | None] = {}
    folders = []
    for text in texts:
        place, glob = _parse(text, flag)
        if output is not None:
            _check_apart(place, glob, output)
        # Not pathlib: an object at the top of a bucket has the parent "", and not ".".
        folders.append(place if glob else place.at(os.path.dirname(place.path)))  # noqa: PTH120
        with as_request_error(flag):
            listed = _list(place, glob, flag) if glob else {place.path: place.file_entry()}
        for path, file in listed.items():
            found[path] = found.get(path) or file  # None: left out by all values
    inputs = _sort_out(_common_root(folders, flag), found)
    if not inputs.files:
        raise RequestError(f"{flag} {' '.join(texts)}: {if_none} ({', '.join(SUFFIXES)})")
    return inputs


def _sort_out(root: Location, found: dict[str, Entry | None]) -> Inputs:
    """Which of the found files are taken, and which paths are left out."""
    files: dict[str, Entry] = {}
    skipped = []
    seen = set()
    links = set(_links(root.path, found)) if root.is_local else set()
    odd = {path for path in found if ODD_CHARACTERS.search(path)}
    # In this order, since of two with one name, or one inode, the first is taken.
    for path in sorted(found.keys() - links - odd) + sorted(links - odd) + sorted(odd):
        file = found[path]
        name = path.removeprefix(root.path).lstrip("/")
        name = printable(name) if path in odd else name
        # A local ETag holds the inode: the rows of a link to another input would count twice.
        is_repeated = file is not None and path in links and file.e_tag in seen
        if file is None or is_repeated or name in files:  # an escaped name may equal another
            skipped.append(path)
        else:
            seen.add(file.e_tag or path)  # a pipe has no ETag
            files[name] = file
    return Inputs(root, dict(sorted(files.items())), sorted(skipped))


def _links(root: str, paths: Iterable[str]) -> Iterator[str]:
    """Those of the paths that are links, or lie below `root` in a folder reached by a link."""
    real_root = os.path.realpath(root)

    @cache
    def is_linked(folder: str) -> bool:
        below = folder.removeprefix(root).lstrip("/")
        return os.path.realpath(folder) != str(Path(real_root, below))

    return (path for path in paths if Path(path).is_symlink() or is_linked(str(Path(path).parent)))


def report_skipped(skipped: list[str], say: Callable[[str], None]) -> None:
    """Say in one line how many paths were left out, with an example."""
    if skipped:
        say(
            f"left out: {len(skipped):,}, such as {printable(skipped[0])} (hidden, no Parquet by "
            "their suffix, folders, links to folders or to files here, odd names)"
        )


def _parse(text: str, flag: str) -> tuple[Location, list[str]]:
    """What a value of the flag names: a folder and the components of a glob in it, or a file."""
    # In a URI a question mark is no wildcard.
    path, mark, options = text.partition("?") if "://" in text else (text, "", "")
    wild = re.search(r"[^/]*[*?\[].*", path, re.DOTALL)
    glob: list[str] = []
    folder = text
    if wild and not os.path.lexists(text):  # a file's name may contain wildcards
        glob = [name for name in wild[0].split("/") if name]
        folder = (path[: wild.start()] or ".") + mark + options
    location = locate_existing(folder, flag)
    with as_request_error(flag):
        if location.is_folder():
            return location, glob or ["**"]
        if not glob and location.file_entry():
            return location, []
    raise RequestError(f"{flag} {text}: there is no such file or folder ({location.display})")


def _list(top: Location, glob: list[str], flag: str) -> dict[str, Entry | None]:
    """Paths that match a glob, and the files there; None for what is left out."""

    def names(path: str) -> list[str]:
        return path.removeprefix(top.path).strip("/").split("/")

    def enter(folder: str) -> bool:
        return _may_hold(glob, names(folder)) and not is_hidden(names(folder)[-1])

    found: dict[str, Entry | None] = {}
    for file in top.listing(enter):
        below = names(file.path)
        if _DELTA_LOG in below and _may_hold(glob, below[: below.index(_DELTA_LOG)]):
            advice = "its log says which files are part of it; jobs/examples/dataset.py scores one"
            raise RequestError(f"{flag} {top.display}: holds a table of Delta Lake; {advice}")
        if not file.is_file and not top.is_local:  # an odd key, such as a//b
            found[file.path] = None
        elif not file.is_file and Path(file.path).is_dir():
            # A folder that is not entered: a link, hidden, or one in which nothing can match.
            if _may_hold(glob, below) or _matches(glob, below):
                found[file.path] = None
        elif _matches(glob, below):
            is_taken = below[-1].lower().endswith(SUFFIXES) and not is_hidden("/".join(below))
            found[file.path] = file if is_taken else None
    return found


def _matches(glob: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a glob matches a path, both by their components; `**` is any number of them."""
    if not names or not glob:
        return not names and all(pattern == "**" for pattern in glob)
    if glob[0] == "**":
        return _matches(glob[1:], names) or _matches(glob, names[1:])
    return fnmatchcase(names[0], glob[0]) and _matches(glob[1:], names[1:])


def _may_hold(glob: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a glob may match what is in a folder, or deeper."""
    for name, pattern in zip(folder, glob, strict=False):
        if pattern == "**":
            return True
        if not fnmatchcase(name, pattern):
            return False
    return len(glob) > len(folder)


def _common_root(folders: list[Location], flag: str) -> Location:
    """The deepest folder that contains all folders."""
    if len({(folder.bucket, folder.query) for folder in folders}) > 1:
        reason = "the files have no disk or bucket in common"
        raise RequestError(f"{flag}: {reason}; score them one after the other")
    return folders[0].at(os.path.commonpath([folder.path for folder in folders]))


def _check_apart(place: Location, glob: list[str], output: Location) -> None:
    """Check that no later run takes output for input, and that no input is in the output folder."""
    inside = output.names_below(place)
    may_match = inside is not None and _may_hold(glob, inside)
    if may_match or place.names_below(output) is not None:
        reason = f"lies in the input {place.display}, or holds it, and would be scored"
        raise RequestError(f"--output {output.display}: {reason}; put it elsewhere")
