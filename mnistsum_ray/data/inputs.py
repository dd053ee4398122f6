"""Input files: which Parquet files `--input` and `--data` name, and their names below one folder.

A glob is matched here, so that it means the same on a disk and in an object store.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from mnistsum_ray.errors import RequestError, did_you_mean, printable
from mnistsum_ray.storage.store import Entry, Location, is_hidden, is_utf8
from mnistsum_ray.storage.uri import locate_existing, refused, split_glob

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""


@dataclass(frozen=True)
class Inputs:
    """The files that some values name."""

    root: Location
    """The deepest folder that contains all files."""
    files: dict[str, Entry]
    """By name relative to `root`, in the order of the names."""
    skipped: list[str]
    """Paths in the named folders that are left out: hidden, without a suffix, or links to folders."""
    unusable: dict[str, str]
    """Name -> reason of each file that cannot be used. `files` has them too. The name is escaped."""


def list_inputs(
    texts: Sequence[str], output: Location | None = None, flag: str = "--input", none: str = "there is no Parquet file"
) -> Inputs:
    """List the files that the values of a flag name: files, globs, and all Parquet files of folders.

    Raises:
        RequestError: a value names nothing, or a table of Delta Lake or Iceberg; there is no Parquet
            file (`none` says so); input and output lie in each other.
    """
    values = [_Value(text, flag) for text in texts]
    root = _common_root(values, flag)
    if output is not None:
        _check_apart(values, output)
    found: dict[str, Entry] = {}
    others: set[str] = set()
    for value in values:
        taken, left_out = value.find()
        found |= taken
        others.update(left_out)
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


class _Value:
    """A value of the flag: a file, or a folder and the pattern of its files."""

    def __init__(self, text: str, flag: str) -> None:
        self.text = text
        self.flag = flag
        fixed, glob = split_glob(text)
        if "://" not in text and os.path.lexists(text):
            fixed, glob = text, None  # a file whose name contains wildcards
        self.is_glob = glob is not None
        self.pattern = glob or ("**", "*")
        self.place = locate_existing(fixed, flag)
        with refused(flag):
            self.file = None if self.is_glob else self.place.status()
            is_there = self.file or self.place.is_folder()
        if not is_there:
            hint = did_you_mean(text, ("sample", "mnist", "auto")) if flag == "--data" else ""
            missing = f"there is no such file or folder ({self.place.display})"
            raise RequestError(f"{flag} {text}: {missing}{hint}")

    @property
    def folder(self) -> str:
        """Path of the folder that the value names, or that holds the file."""
        return str(Path(self.place.path).parent) if self.file else self.place.path

    def find(self) -> tuple[dict[str, Entry], list[str]]:
        """The files that the value names, by path, and the paths in its folder that are left out."""
        if self.file:
            return {self.file.path: self.file}, []
        found = {}
        skipped = []
        tables = set()
        with refused(self.flag), self.place.answers("listed"):
            for path, file in self._seen():
                parts = parts_below(path, self.place.path) or ()
                tables |= _table_of(parts)
                has_suffix = self.is_glob or path.lower().endswith(SUFFIXES)
                if file and has_suffix and matches(parts, self.pattern):
                    found[path] = file
                elif not self.is_glob:
                    skipped.append(path)
        for name in sorted(tables):
            table = self.place / name if name else self.place
            if any(parts_below(path, table.path) for path in found):
                table_of = "a table of Delta Lake or Iceberg, whose files may hold deleted rows"
                instead = "write its rows out as plain Parquet, or name the files"
                raise RequestError(f"{self.flag} {table.display}: is {table_of}; {instead}")
        return found, skipped

    def _seen(self) -> Iterator[tuple[str, Entry | None]]:
        """The files of the folder by path; None for a folder that is left out."""
        if not self.place.is_local:
            yield from ((file.path, file) for file in self.place.files())
            return
        for folder, folders, names in os.walk(self.place.path, onerror=_fail):
            above = parts_below(folder, self.place.path) or ()
            here = self.place.at(folder)
            # No folder is read in which nothing can match: of /*/x.parquet it would be the whole disk.
            inside = [name for name in folders if matches((*above, name), self.pattern, below=True)]
            inside = [name for name in inside if not Path(folder, name).is_symlink()]
            for name in set(folders).difference(inside):
                yield (here / name).path, None
            for name in names:
                file = here / name
                yield file.path, file.status() or Entry(file.path, 0, "")
            folders[:] = inside


def _table_of(parts: tuple[str, ...]) -> set[str]:
    """The folder of the table of Delta Lake or Iceberg that a file with these components shows."""
    if "_delta_log" in parts:
        return {"/".join(parts[: parts.index("_delta_log")])}
    if parts[-2:-1] == ("metadata",) and parts[-1].endswith(".metadata.json"):
        return {"/".join(parts[:-2])}
    return set()


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
    for value in values:
        if (value.place.bucket, value.place.query) != (first.bucket, first.query):
            reason = "the files have no disk or bucket in common"
            raise RequestError(f"{flag}: {reason}; score them one after the other")
    return first.at(os.path.commonpath([value.folder for value in values]))


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
