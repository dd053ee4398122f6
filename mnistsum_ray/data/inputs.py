"""Input files: which Parquet files `--input` and `--data` name, and their names below one folder.

A glob means the same on a disk and in an object store: files are listed, and their names matched.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, NamedTuple

from mnistsum_ray.errors import RequestError, printable
from mnistsum_ray.storage.store import Entry, Location, is_hidden
from mnistsum_ray.storage.uri import as_request_error, locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

_DELTA_LOG: Final = "_delta_log"
"""Folder in a table of Delta Lake with its log, which says which files are still part of it."""

Components = tuple[str, ...]
"""Components of a path, or of a glob, in which `**` is any number of folders."""


class _Value(NamedTuple):
    """A value of the flag: a folder and a glob of files in it, or a file and ()."""

    location: Location
    glob: Components


@dataclass(frozen=True)
class Inputs:
    """The files that some values name."""

    root: Location
    """The deepest folder that contains all files."""
    files: dict[str, Entry]
    """By name relative to `root`, in the order of the names."""
    skipped: list[str]
    """Paths that are left out: hidden, without a suffix, or links to folders."""
    unusable: dict[str, str]
    """Why files cannot be used, by name. `files` has them too; names are as of `printable`."""


def list_inputs(
    texts: Sequence[str],
    output: Location | None = None,
    flag: str = "--input",
    none: str = "there is no Parquet file",
) -> Inputs:
    """List what the values of a flag name: files, globs, and folders with all their Parquet files.

    Raises:
        RequestError: a value names nothing, or a table of Delta Lake; there is no Parquet file
            (`none` says so); input and output lie in each other.
    """
    values = [_parse(text, flag) for text in texts]
    root = _common_root(values, flag)
    if output is not None:
        _check_outside_input(values, output)
    found: dict[str, Entry | None] = {}
    for value in values:
        with as_request_error(flag), value.location.storage_errors("listed"):
            for path, file in _list(value, flag):
                found[path] = found.get(path) or file  # what one leaves out another may name
    files: dict[str, Entry] = {}
    unusable: dict[str, str] = {}
    for path, file in sorted(found.items()):
        if file is not None:
            name = path.removeprefix(root.path).lstrip("/")
            fault = _fault(file)
            if fault:
                name = printable(name)
                unusable[name] = fault
            files[name] = file
    if not files:
        raise RequestError(f"{flag} {' '.join(texts)}: {none} ({', '.join(SUFFIXES)})")
    skipped = sorted(path for path, file in found.items() if file is None)
    return Inputs(root, files, skipped, unusable)


def report_skipped(skipped: list[str], say: Callable[[str], None]) -> None:
    """Say in one line how many paths were left out, with an example."""
    if skipped:
        kinds = "hidden, without a suffix of Parquet, or links to folders"
        say(f"left out: {len(skipped):,}, such as {printable(skipped[0])} ({kinds})")


def _fault(file: Entry) -> str | None:
    """Why a file cannot be used, as far as a listing says."""
    if file.path != file.path.encode(errors="replace").decode():
        return "its name is not UTF-8; rename it"
    if re.search(r"[\x00-\x1f\x7f-\x9f]", file.path):
        return "its name holds a control character; rename it"
    return None if file.e_tag else "is a link that leads nowhere, or no file"


def _parse(text: str, flag: str) -> _Value:
    """A value of the flag, which names something that is there."""
    # In a URI a question mark begins options, and is no wildcard.
    path, question, query = text.partition("?") if "://" in text else (text, "", "")
    wild = re.search(r"[^/]*[*?\[].*", path, re.DOTALL)
    glob: Components = ()
    folder = text
    if wild and not os.path.lexists(text):  # a file's name may contain wildcards
        glob = tuple(pattern for pattern in wild[0].split("/") if pattern)
        folder = (path[: wild.start()] or ".") + question + query
    if glob and glob[-1] == "**":
        glob = (*glob, "*")
    location = locate_existing(folder, flag)
    with as_request_error(flag):
        if location.is_folder():
            return _Value(location, glob or ("**", "*"))
        if not glob and location.status():
            return _Value(location, ())
    raise RequestError(f"{flag} {text}: there is no such file or folder ({location.display})")


def _list(value: _Value, flag: str) -> Iterator[tuple[str, Entry | None]]:
    """Paths that a value names, and the files there; None for what is left out."""
    top, glob = value
    if not glob:
        yield top.path, top.status()
        return
    listed = _walk(top, glob) if top.is_local else ((file.path, file) for file in top.files())
    for path, file in listed:
        below = components_below(path, top.path) or ()
        if _DELTA_LOG in below and _matches(below[: below.index(_DELTA_LOG)], glob, partly=True):
            advice = "its log says which files are part of it; jobs/recipes/dataset.py scores one"
            raise RequestError(f"{flag} {top.display}: holds a table of Delta Lake; {advice}")
        if file is None:
            yield path, None
        elif _matches(below, glob):
            is_taken = path.lower().endswith(SUFFIXES) and not is_hidden("/".join(below))
            yield path, file if is_taken else None


def _walk(top: Location, glob: Components) -> Iterator[tuple[str, Entry | None]]:
    """Files on a disk that may match; None for folders that are not read: hidden, or links."""
    for above, folders, names in os.walk(top.path, onerror=_fail):
        folder = top.at(above)
        for name in names:
            file = folder / name
            # A link that leads nowhere, or a pipe, gets no e_tag: `_fault` says so.
            yield file.path, file.status() or Entry(file.path, 0, "")
        for name in [*folders]:
            path = (folder / name).path
            may_match = _matches(components_below(path, top.path) or (), glob, partly=True)
            is_left_out = is_hidden(name) or Path(path).is_symlink()
            if is_left_out or not may_match:
                folders.remove(name)  # `os.walk` does not read it then
            if is_left_out and (may_match or name == _DELTA_LOG):
                yield path, None


def _fail(error: OSError) -> None:
    """For `os.walk`, which would leave out a folder that it may not read."""
    raise error


def _matches(path: Components, glob: Components, partly: bool = False) -> bool:
    """Whether a path matches a glob, or with `partly` whether a path below it may."""
    if partly and not path:
        return bool(glob)
    if not path or not glob:
        return path == glob
    if glob[0] == "**":  # no folder, or one and perhaps more
        return partly or _matches(path, glob[1:]) or _matches(path[1:], glob)
    return fnmatchcase(path[0], glob[0]) and _matches(path[1:], glob[1:], partly)


def components_below(path: str, folder: str) -> Components | None:
    """Components of a path relative to a folder: () for the folder itself, None for one outside."""
    if path == folder:
        return ()
    start = folder.rstrip("/") + "/" if folder else ""  # the whole bucket
    return tuple(path.removeprefix(start).split("/")) if path.startswith(start) else None


def _common_root(values: list[_Value], flag: str) -> Location:
    """The deepest folder that contains all values."""
    first = values[0].location
    folders = []
    for location, glob in values:
        if (location.bucket, location.query) != (first.bucket, first.query):
            reason = "the files have no disk or bucket in common"
            raise RequestError(f"{flag}: {reason}; score them one after the other")
        folders.append(location.path if glob else str(Path(location.path).parent))
    return first.at(os.path.commonpath(folders))


def _check_outside_input(values: list[_Value], output: Location) -> None:
    """Check that no later run takes output for input, and that no input is in the output folder."""
    for location, glob in values:
        if location.bucket != output.bucket:
            return
        inside = components_below(real_path(output), real_path(location))
        may_match = inside is not None and _matches(inside, glob, partly=True)
        if may_match or components_below(real_path(location), real_path(output)) is not None:
            reason = f"lies in the input {location.display}, or holds it, and would be scored"
            raise RequestError(f"--output {output.display}: {reason}; put it elsewhere")


def real_path(location: Location) -> str:
    """The path without links: two ways to a folder may differ in them."""
    return os.path.realpath(location.path) if location.is_local else location.path
