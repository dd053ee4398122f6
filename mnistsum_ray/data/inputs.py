"""Input files: which Parquet files `--input` and `--data` name, and their names below one folder.

Links to files are followed. Links to folders are not, but for those that a value names, so that
every listing ends. Local files are listed here and not by Arrow, which follows links and lists
everything below a folder first: for `/*/name.parquet` the whole disk.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

import pyarrow as pa

from mnistsum_ray.errors import RequestError, did_you_mean
from mnistsum_ray.storage.location import Entry, Location, is_hidden, is_utf8
from mnistsum_ray.storage.paths import locate_existing, refused
from mnistsum_ray.storage.uri import split_glob

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder that was listed
        "size": pa.int64(),  # bytes
        "modified": pa.int64(),  # nanoseconds since 1970
    }
)

_NAME: Final = "its name"
"""Why a file is skipped whose name is hidden or has no suffix of Parquet."""


@dataclass(frozen=True)
class Inputs:
    """The files that some values name."""

    root: Location
    """The deepest folder that contains all files."""
    files: pa.Table
    """FILE_SCHEMA, sorted by name; the names are relative to `root`."""
    skipped: dict[str, str]
    """Files in the named folders that are not taken: path and reason."""
    unusable: dict[str, str]
    """Files that cannot be opened: name and reason. `files` lists them too."""


def list_inputs(
    texts: Sequence[str], output: Location | None = None, flag: str = "--input", none: str = "there is no Parquet file"
) -> Inputs:
    """List the files that the values of a flag name: files, globs, and folders, of which all Parquet files.

    Raises:
        RequestError: a named file or folder does not exist, there is no Parquet file (`none` says
            so), or the output is inside the input.
    """
    values = [_Value(text, flag) for text in texts]
    root = _common_root(values, flag).with_retries()
    found: dict[str, Entry] = {}
    skipped: dict[str, str] = {}
    for value in values:
        for path, file in value.list():
            if isinstance(file, str):
                skipped[path] = file
            else:
                found[path] = file
    skipped = {path: reason for path, reason in skipped.items() if path not in found}
    if not found:
        others = f" (there are others, such as {_escaped(min(skipped))})" if skipped else ""
        shown = " ".join(value.text for value in values)
        raise RequestError(f"{flag} {shown}: {none} ({', '.join(SUFFIXES)}){others}")
    # A file that has several paths keeps its own, or else the first in the alphabet.
    listed: set[str] = set()
    for path in sorted(found, key=lambda path: (found[path].path != path, path)):
        if found[path].path in listed:
            skipped[path] = "a link to a file that is listed anyway"
            del found[path]
        else:
            listed.add(found[path].path)
    if output is not None:
        _check_output_is_separate(values, found, output)
    rows = []
    unusable = {}
    for path, file in sorted(found.items()):
        name = _escaped(path.removeprefix(root.path).removeprefix("/"))
        rows.append({"name": name, "size": file.size, "modified": file.modified})
        if not is_utf8(path):
            unusable[name] = "its name is not UTF-8; rename it"
        if "//" in path:  # an object store allows such a key, and Arrow does not
            unusable[name] = "its name has an empty part between two slashes; rename it"
    return Inputs(root, pa.Table.from_pylist(rows, FILE_SCHEMA), skipped, unusable)


def report_skipped(skipped: dict[str, str], say: Callable[[str], None]) -> None:
    """Say one line for each reason of `Inputs.skipped`, with the number of paths and an example."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        because = "for their names" if reason == _NAME else f"since each is {reason}"
        say(f"left out {because}: {len(paths):,}, such as {_escaped(min(paths))}")


class _Value:
    """A value of the flag: a file, or a folder and the glob of its files."""

    def __init__(self, text: str, flag: str) -> None:
        self.flag = flag
        self.text = text
        fixed, glob = split_glob(text)
        if glob and "://" not in text and os.path.lexists(text):
            fixed, glob = text, None  # a file whose name contains wildcards
        self.place = locate_existing(fixed, flag)
        if self.place.is_local:
            self.place = self.place.at(os.path.realpath(self.place.path))
        with refused(flag):
            found = self.place.status()
        if found is None:
            hint = did_you_mean(text, ("sample", "mnist", "auto")) if flag == "--data" else ""
            raise self.error(f"there is no such file or folder ({self.place.display}){hint}")
        self.found = found
        self.is_file = not found.is_folder
        self.is_glob = glob is not None
        self.pattern = glob or ("**", "*")
        if self.is_glob and self.is_file:
            raise self.error(f"{self.place.display} is a file, not a folder")

    def error(self, message: str) -> RequestError:
        return RequestError(f"{self.flag} {self.text}: {message}")

    @property
    def folder(self) -> str:
        """Path of the folder that the value names, or that holds the file."""
        return str(Path(self.place.path).parent) if self.is_file else self.place.path

    def list(self) -> Iterator[tuple[str, Entry | str]]:
        """Paths that the value names, each with its file, or with the reason why it is left out."""
        with refused(self.flag), self.place.answers("listed"):
            if self.is_file:
                file = _look_at(self.place.path) if self.place.is_local else self.found
                if isinstance(file, str):
                    raise self.error(f"is {file}")
                yield self.place.path, file
            elif self.place.is_local:
                yield from self._walk()
            else:
                for entry in self.place.files():
                    if self._takes(parts_below(entry.path, self.place.path) or ()):
                        yield entry.path, entry
                    elif not self.is_glob:
                        yield entry.path, _NAME

    def _walk(self) -> Iterator[tuple[str, Entry | str]]:
        """As `list`, of a local folder; none in it is read in which nothing can match."""
        folders: list[tuple[str, tuple[str, ...]]] = [(self.place.path, ())]
        while folders:
            folder, above = folders.pop()
            with os.scandir(folder) as scan:
                entries = list(scan)
            for entry in entries:
                parts = (*above, entry.name)
                is_link = entry.is_symlink()
                is_folder = Path(entry.path).is_dir() if is_link else entry.is_dir()
                if is_folder and matches(parts, self.pattern, below=True):
                    if is_link:
                        yield entry.path, "a link to a folder"
                    else:
                        folders.append((entry.path, parts))
                elif not is_folder and self._takes(parts):
                    yield entry.path, _look_at(entry.path)
                elif not self.is_glob:
                    yield entry.path, _NAME

    def _takes(self, parts: tuple[str, ...]) -> bool:
        has_suffix = self.is_glob or parts[-1].lower().endswith(SUFFIXES)
        return has_suffix and matches(parts, self.pattern)

    def covers(self, folder: str) -> bool:
        """True if the value is a folder or glob and may name files in this folder."""
        parts = parts_below(folder, self.place.path)
        if self.is_file or parts is None:
            return False
        return not self.is_glob or matches(parts, self.pattern, below=True)


def _look_at(path: str) -> Entry | str:
    """A local file, whose path has all links resolved; or what is there instead."""
    try:
        status = Path(path).stat()
    except OSError:  # it does not exist, or its links lead in a circle
        return "a link that leads nowhere"
    if not stat.S_ISREG(status.st_mode):
        return "a device, a pipe or a socket"
    return Entry(os.path.realpath(path), status.st_size, status.st_mtime_ns)


def matches(parts: tuple[str, ...], pattern: tuple[str, ...], *, below: bool = False) -> bool:
    """True if a path matches: `**` is any number of folders; no wildcard begins a hidden name.

    Path and pattern are split into components. With `below` the path is a folder, below which
    something must be able to match.
    """
    if not pattern:
        return not parts and not below
    if pattern[0] == "**":
        if matches(parts, pattern[1:], below=below):
            return True
        if not parts:
            return below
        return not is_hidden(parts[0]) and matches(parts[1:], pattern, below=below)
    if not parts:
        return below
    if is_hidden(parts[0]) and parts[0][0] != pattern[0][0]:
        return False
    return fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:], below=below)


def parts_below(path: str, folder: str) -> tuple[str, ...] | None:
    """Components of a path relative to a folder: () for the folder itself, None for one outside."""
    if path == folder:
        return ()
    start = folder.rstrip("/") + "/"
    return tuple(path.removeprefix(start).split("/")) if path.startswith(start) else None


def _escaped(path: str) -> str:
    r"""A path for messages and files: bytes that are not UTF-8 are escaped, such as \udcff."""
    return path.encode("utf-8", "backslashreplace").decode()


def _common_root(values: list[_Value], flag: str) -> Location:
    """The deepest folder that contains all values."""
    first = values[0].place
    folder = ""
    if all(first.filesystem.equals(value.place.filesystem) for value in values):
        folder = os.path.commonpath([value.folder for value in values])
    if not folder:
        reason = "the files have no folder or bucket in common"
        raise RequestError(f"{flag}: {reason}; score them one after the other")
    return first.at(folder)


def _check_output_is_separate(values: list[_Value], found: Iterable[str], output: Location) -> None:
    """Check that no later run takes output for input, and that no input is in the output folder."""
    if not values[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    where = f"--output {output.display}"
    for value in values:
        if value.covers(path):
            reason = f"lies in the input {value.text} and would be scored next time"
            raise RequestError(f"{where}: {reason}; put it elsewhere")
    inside = next((file for file in found if parts_below(file, path) is not None), None)
    if inside is not None:
        raise RequestError(f"{where}: holds the input file {_escaped(inside)}; put it elsewhere")
