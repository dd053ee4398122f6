"""Input files: which Parquet files `--input` and `--data` name, and the name of each relative to their common folder.

Links to files are followed. Links to folders are not, but for those that a value names, so that every listing ends. Local files
are listed here and not by Arrow, which follows links and lists everything below a folder first: for `/*/name.parquet` the whole
disk.
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

_FOLDER_LINK: Final = "a link to a folder"


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
    """List the files that the values of a flag name: files, globs, and folders, of which all Parquet files are taken.

    Raises:
        RequestError: a named file or folder does not exist, there is no Parquet file (`none` says so), or the output is inside
            the input.
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
    # A file that has several paths keeps its own, or else the first in the alphabet.
    kept: dict[str, str] = {}
    for path in sorted(path for path, file in found.items() if file.path != path):
        if found[path].path in found or kept.setdefault(found[path].path, path) != path:
            skipped[path] = "a link to a file that is listed anyway"
            del found[path]
    if not found:
        others = f" (there are others, such as {_escaped(min(skipped))})" if skipped else ""
        shown = " ".join(value.text for value in values)
        raise RequestError(f"{flag} {shown}: {none} ({', '.join(SUFFIXES)}){others}")
    if output is not None:
        _check_output_is_separate(values, found, output)
    paths = sorted(found)
    names = [_escaped(path.removeprefix(root.path).removeprefix("/")) for path in paths]
    unusable = {}
    for name, path in zip(names, paths, strict=True):
        if not is_utf8(path):
            unusable[name] = "its name is not UTF-8; rename it"
        if "//" in path:  # an object store allows such a key, and Arrow does not
            unusable[name] = "its name has an empty part between two slashes; rename it"
    sizes, times = ([getattr(found[path], field) for path in paths] for field in ("size", "modified"))
    skipped = {path: reason for path, reason in skipped.items() if path not in found}
    return Inputs(root, pa.table([names, sizes, times], FILE_SCHEMA), skipped, unusable)


def report_skipped(skipped: dict[str, str], say: Callable[[str], None]) -> None:
    """Say one line for each reason of `Inputs.skipped`, with the number of paths and an example."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        because = "for their names" if reason == _NAME else f"since each is {reason}"
        say(f"left out {because}: {len(paths):,}, such as {_escaped(min(paths))}")


class _Value:
    """A value of the flag, located: a file, a folder, or a folder and the part of a glob that has wildcards."""

    def __init__(self, text: str, flag: str) -> None:
        self.flag = flag
        self.text = text
        fixed, self.pattern = split_glob(text)
        if self.pattern is not None and "://" not in text and os.path.lexists(text):
            fixed, self.pattern = text, None  # a file whose name contains wildcards
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
        if self.pattern is not None and self.is_file:
            raise self.error(f"{self.place.display} is a file, not a folder")

    def error(self, message: str) -> RequestError:
        return RequestError(f"{self.flag} {self.text}: {message}")

    @property
    def folder(self) -> str:
        """Path of the folder that the value names, or that holds the file."""
        if not self.is_file:
            return self.place.path
        above = self.place.path.rpartition("/")[0]
        return "/" if self.place.is_local and not above else above

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
                    elif self.pattern is None:
                        yield entry.path, _NAME

    def _walk(self) -> Iterator[tuple[str, Entry | str]]:
        """As `list`, of a local folder; none is read in which nothing can match."""
        folders: list[tuple[str, tuple[str, ...]]] = [(self.place.path, ())]
        while folders:
            folder, above = folders.pop()
            try:
                with os.scandir(folder) as scan:
                    entries = list(scan)
            except PermissionError:
                if self.pattern is None:
                    raise
                yield folder, "a folder that cannot be read"
                continue
            for entry in entries:
                parts = (*above, entry.name)
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder and self._descends(parts):
                    folders.append((entry.path, parts))
                elif not is_folder and (self._takes(parts) or (self._descends(parts) and _look_at(entry.path) == _FOLDER_LINK)):
                    yield entry.path, _look_at(entry.path)
                elif self.pattern is None:
                    yield entry.path, _NAME

    def _takes(self, parts: tuple[str, ...]) -> bool:
        """True if the value names a file with these path components below `place`."""
        if self.pattern is None:
            return parts[-1].lower().endswith(SUFFIXES) and not is_hidden("/".join(parts))
        return matches(parts, self.pattern)

    def _descends(self, parts: tuple[str, ...]) -> bool:
        """True if the value may name files in a folder with these path components below `place`."""
        return not is_hidden(parts[-1]) if self.pattern is None else matches(parts, self.pattern, below=True)

    def covers(self, folder: str) -> bool:
        """True if the value is a folder or glob and may name files in this folder."""
        parts = parts_below(folder, self.place.path)
        return not self.is_file and parts is not None and (self.pattern is None or matches(parts, self.pattern, below=True))


def _look_at(path: str) -> Entry | str:
    """A local file, whose path has all links resolved; or what is there instead."""
    try:
        status = Path(path).stat()
    except OSError:  # it does not exist, or its links lead in a circle
        return "a link that leads nowhere"
    if stat.S_ISREG(status.st_mode):
        return Entry(os.path.realpath(path), status.st_size, status.st_mtime_ns)
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
    return f"a link to {kind}" if Path(path).is_symlink() else kind


def matches(parts: tuple[str, ...], pattern: tuple[str, ...], *, below: bool = False) -> bool:
    """True if a path matches as in a shell: `**` matches any number of folders, no wildcard matches a leading dot.

    Path and pattern are split into components. With `below` the path is a folder, below which something must be able to match.
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


def parts_below(path: str, folder: str) -> tuple[str, ...] | None:
    """Components of a path relative to a folder: () for the folder itself, None for a path outside of it."""
    if path == folder:
        return ()
    return tuple(path[len(folder) :].lstrip("/").split("/")) if path.startswith(folder.rstrip("/") + "/") else None


def _escaped(path: str) -> str:
    r"""A path for messages and files: bytes that are not UTF-8 are escaped, such as \udcff."""
    return path.encode("utf-8", "backslashreplace").decode()


def _common_root(values: list[_Value], flag: str) -> Location:
    """The deepest folder that contains all values."""
    first = values[0]
    folder = first.folder
    for other in values[1:]:
        if not other.place.filesystem.equals(first.place.filesystem):
            raise other.error(f"lies on another storage than {first.text}; score them one after the other")
        folder = os.path.commonpath([folder, other.folder]) if folder and other.folder else ""
    if not folder:
        raise RequestError(f"{flag}: the files have no folder or bucket in common; score them one after the other")
    return first.place.at(folder)


def _check_output_is_separate(values: list[_Value], found: Iterable[str], output: Location) -> None:
    """Check that the next run would not take output for input, and that no input file is inside the output folder."""
    if not values[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    for value in values:
        if value.covers(path):
            raise RequestError(
                f"--output {output.display}: lies in the input {value.text} and would be scored next time; put it elsewhere"
            )
    inside = next((file for file in found if parts_below(file, path) is not None), None)
    if inside is not None:
        raise RequestError(f"--output {output.display}: holds the input file {_escaped(inside)}; put it elsewhere")
