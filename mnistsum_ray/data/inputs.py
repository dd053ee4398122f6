"""Input files: which Parquet files `--input` and `--data` name, and their names below one folder.

A glob is matched here, so that it means the same on a disk and in an object store.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from mnistsum_ray.errors import RequestError, did_you_mean, printable
from mnistsum_ray.storage.store import Entry, Location, is_hidden, is_utf8
from mnistsum_ray.storage.uri import locate_existing, refused, split_glob

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

_OF_A_TABLE: Final = r"(?s)(|.*/)(_delta_log(/.*)?|metadata/[^/]*\.metadata\.json)"
"""Path of a file that only a table of Delta Lake or Iceberg has; the first group is its folder."""


@dataclass(frozen=True)
class Inputs:
    """The files that some values name."""

    root: Location
    """The deepest folder that contains all files."""
    files: dict[str, Entry]
    """By name relative to `root`, in the order of the names."""
    skipped: list[str]
    """Paths in the folders that are left out: hidden, without a suffix, or links to folders."""
    unusable: dict[str, str]
    """Why files cannot be used, by name, which is escaped. `files` has them too."""


def list_inputs(
    texts: Sequence[str],
    output: Location | None = None,
    flag: str = "--input",
    none: str = "there is no Parquet file",
) -> Inputs:
    """List what the values of a flag name: files, globs, and folders with all their Parquet files.

    Raises:
        RequestError: a value names nothing, or a table of Delta Lake or Iceberg; there is no
            Parquet file (`none` says so); input and output lie in each other.
    """
    values = [_parsed(text, flag) for text in texts]
    root = _common_root(values, flag)
    if output is not None:
        _check_apart(values, output)
    found: dict[str, Entry] = {}
    others: set[str] = set()
    for value in values:
        with refused(flag):
            listed = value.list_files()
        taken = {path: file for path, file in listed.items() if file and value.takes(path)}
        _check_no_table(value, listed, taken, flag)
        found |= taken
        if not value.is_glob:
            others.update(listed)
    skipped = sorted(others - found.keys())
    if not found:
        hint = f" (there are others, such as {printable(skipped[0])})" if skipped else ""
        raise RequestError(f"{flag} {' '.join(texts)}: {none} ({', '.join(SUFFIXES)}){hint}")
    files = {}
    unusable = {}
    for path, file in sorted(found.items()):
        name = path.removeprefix(root.path).lstrip("/")
        fault = _fault(file)
        if fault:
            name = printable(name)
            unusable[name] = fault
        files[name] = file
    return Inputs(root, files, skipped, unusable)


def report_skipped(skipped: list[str], say: Callable[[str], None]) -> None:
    """Say in one line how many paths were left out, with an example."""
    if skipped:
        kinds = "hidden, without a suffix of Parquet, or links to folders"
        say(f"left out: {len(skipped):,}, such as {printable(skipped[0])} ({kinds})")


def _fault(file: Entry) -> str | None:
    """Why a file cannot be used, as far as a listing says."""
    if not is_utf8(file.path):
        return "its name is not UTF-8; rename it"
    if re.search(r"[\x00-\x1f\x7f-\x9f]", file.path):
        return "its name holds a control character; rename it"
    return None if file.e_tag else "is a link that leads nowhere, or no file"


@dataclass(frozen=True)
class _Value:
    """A value of the flag."""

    text: str
    place: Location
    """The file, the folder, or the folders of a glob that have no wildcards."""
    file: Entry | None
    """None where it is no file."""
    is_glob: bool
    pattern: tuple[str, ...]
    """Of files below `place`, by component."""

    def takes(self, path: str) -> bool:
        """Whether the value names this file, which it has listed."""
        has_suffix = self.is_glob or path.lower().endswith(SUFFIXES)
        parts = parts_below(path, self.place.path) or ()
        return self.file is not None or (has_suffix and matches(parts, self.pattern))

    def list_files(self) -> dict[str, Entry | None]:
        """The file, or the files in the folder, by path; None for a folder that is not read."""
        if self.file:
            return {self.file.path: self.file}
        with self.place.answers("listed"):
            if self.place.is_local:
                return dict(self._walk())
            return {file.path: file for file in self.place.files()}

    def _walk(self) -> Iterator[tuple[str, Entry | None]]:
        for folder, folders, names in os.walk(self.place.path, onerror=_fail):
            above = parts_below(folder, self.place.path) or ()
            here = self.place.at(folder)
            read = []
            for name in folders:
                # Where nothing can match is not read: of /*/x.parquet it would be the whole disk.
                can_match = matches((*above, name), self.pattern, below=True)
                if can_match and not Path(folder, name).is_symlink():
                    read.append(name)
                else:
                    yield (here / name).path, None
            for name in names:
                file = here / name
                yield file.path, file.status() or Entry(file.path, 0, "")
            folders[:] = read


def _parsed(text: str, flag: str) -> _Value:
    """A value of the flag, which names something that is there."""
    fixed, glob = split_glob(text)
    if "://" not in text and os.path.lexists(text):
        fixed, glob = text, None  # a file whose name contains wildcards
    place = locate_existing(fixed, flag)
    with refused(flag):
        file = None if glob else place.status()
        is_there = file or place.is_folder()
    if not is_there:
        hint = did_you_mean(text, ("sample", "mnist", "auto")) if flag == "--data" else ""
        missing = f"there is no such file or folder ({place.display})"
        raise RequestError(f"{flag} {text}: {missing}{hint}")
    return _Value(text, place, file, glob is not None, glob or ("**", "*"))


def _check_no_table(value: _Value, listed: Iterable[str], taken: Iterable[str], flag: str) -> None:
    """Refuse what is taken from a folder that other files in it show to be a table."""
    matched = [re.fullmatch(_OF_A_TABLE, path) for path in listed]
    for folder in sorted({match[1] for match in matched if match}):
        if any(path.startswith(folder) for path in taken):
            place = value.place.at(folder.rstrip("/"))
            what = "a table of Delta Lake or Iceberg, whose files may hold deleted rows"
            instead = "write its rows out as plain Parquet, or name the files"
            raise RequestError(f"{flag} {place.display}: is {what}; {instead}")


def matches(parts: tuple[str, ...], pattern: tuple[str, ...], *, below: bool = False) -> bool:
    """True if a path matches: `**` is any number of folders; no wildcard begins a hidden name.

    Path and pattern are split into components. With `below` the path is a folder, below which
    something must be able to match.
    """
    if not pattern:
        return not parts and not below
    if pattern[0] == "**" and matches(parts, pattern[1:], below=below):
        return True
    if not parts:
        return below
    if pattern[0] == "**":
        return not is_hidden(parts[0]) and matches(parts[1:], pattern, below=below)
    if is_hidden(parts[0]) and parts[0][0] != pattern[0][0]:
        return False
    return fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:], below=below)


def parts_below(path: str, folder: str) -> tuple[str, ...] | None:
    """Components of a path relative to a folder: () for the folder itself, None for one outside."""
    if path == folder:
        return ()
    start = folder.rstrip("/") + "/" if folder else ""  # the whole bucket
    return tuple(path.removeprefix(start).split("/")) if path.startswith(start) else None


def _fail(error: OSError) -> None:
    """For `os.walk`, which would leave out a folder that it may not read."""
    raise error


def _common_root(values: list[_Value], flag: str) -> Location:
    """The deepest folder that contains all values."""
    first = values[0].place
    folders = []
    for value in values:
        place = value.place
        if (place.bucket, place.query) != (first.bucket, first.query):
            reason = "the files have no disk or bucket in common"
            raise RequestError(f"{flag}: {reason}; score them one after the other")
        folders.append(str(Path(place.path).parent) if value.file else place.path)
    return first.at(os.path.commonpath(folders))


def _check_apart(values: list[_Value], output: Location) -> None:
    """Check that no later run takes output for input, and that no input is in the output folder."""
    if values[0].place.bucket != output.bucket:
        return
    where = f"--output {output.display}"
    for value in values:
        inside = parts_below(real_path(output), real_path(value.place))
        if inside is not None and (not value.is_glob or matches(inside, value.pattern, below=True)):
            reason = f"lies in the input {value.text} and would be scored next time"
            raise RequestError(f"{where}: {reason}; put it elsewhere")
        if parts_below(real_path(value.place), real_path(output)) is not None:
            raise RequestError(f"{where}: holds the input {value.text}; put it elsewhere")


def real_path(place: Location) -> str:
    """The path without links: two ways to a folder may differ in them."""
    return os.path.realpath(place.path) if place.is_local else place.path
