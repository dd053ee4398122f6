"""Input files: which Parquet files `--input` and `--data` name, and the name of each relative to their common folder."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.listing import (
    DUPLICATE,
    FileEntry,
    Listing,
    Pattern,
    duplicate_paths,
    escape_non_utf8,
    is_hidden,
    list_file,
    list_folder,
    relative_parts,
    special_file_error,
)
from mnistsum_ray.storage.location import Location, is_utf8
from mnistsum_ray.storage.paths import locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""Suffixes of the files that are taken from a folder, in upper or lower case."""

FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder that was listed
        "size": pa.int64(),  # bytes
        "modified": pa.int64(),  # nanoseconds since 1970
    }
)


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

    Args:
        texts: the values.
        output: folder that must be separate from them.
        flag: names the values in messages.
        none: says in the message that there is no file.

    Raises:
        RequestError: a named file or folder does not exist, there is no Parquet file, or the output is inside the input.
    """
    values = [_Value(text, flag) for text in texts]
    root = _common_root(values, flag)
    found: dict[str, FileEntry] = {}
    skipped: dict[str, str] = {}
    for value in values:
        listing = value.list()
        found |= listing.files
        skipped |= listing.skipped
    for path in duplicate_paths(found):
        skipped[path] = DUPLICATE
        del found[path]
    if not found:
        others = f" (there are others, such as {escape_non_utf8(min(skipped))})" if skipped else ""
        shown = " ".join(value.text for value in values)
        raise RequestError(f"{flag} {shown}: {none} ({', '.join(SUFFIXES)}){others}")
    if output is not None:
        _check_output_is_separate(values, found, output)
    rows, unusable = [], {}
    for path, entry in sorted(found.items()):
        name = escape_non_utf8(path.removeprefix(root.path).lstrip("/"))
        if not is_utf8(path):
            unusable[name] = "its name is not UTF-8; rename it"
        rows.append({"name": name, "size": entry.size, "modified": entry.modified})
    skipped = {path: reason for path, reason in skipped.items() if path not in found}
    return Inputs(root, pa.Table.from_pylist(rows, FILE_SCHEMA), skipped, unusable)


class _Value:
    """A value of the flag, located: a file, a folder, or a folder and the part of a glob that has wildcards.

    Raises:
        RequestError: nothing is there, or it cannot be accessed.
    """

    def __init__(self, text: str, flag: str) -> None:
        self.flag, self.text = flag, text
        """The value as messages show it: a URI without its query, which may hold keys."""
        # In a URI, a question mark begins the query and is no wildcard.
        fixed, self.pattern = _split_glob(text, r"[*\[]" if "://" in text else r"[*?\[]")
        place = locate_existing(text if self.pattern is None else fixed, flag)
        if self.pattern is not None and "://" not in text and os.path.lexists(text):
            place, self.pattern = locate_existing(text, flag), None  # a file whose name contains wildcards
        if place.is_local:
            place = place.at(os.path.realpath(place.path))
        else:
            self.text = "/".join((place.display, *(self.pattern or ())))
        self.place = place
        try:
            kind, special = place.info().type, special_file_error(place)
        except OSError as error:
            raise self.error(one_line(error)) from None
        if kind == pafs.FileType.NotFound:
            raise self.error(f"there is no such file or folder ({place.display})")
        if special:
            raise self.error(special)
        self.is_file = bool(kind == pafs.FileType.File)
        if self.pattern is not None and self.is_file:
            raise self.error(f"{place.display} is a file, not a folder")

    def error(self, message: str) -> RequestError:
        return RequestError(f"{self.flag} {self.text}: {message}")

    @property
    def folder(self) -> str:
        """Path of the folder that the value names, or that holds the file."""
        path = self.place.path
        return (path.rpartition("/")[0] or "/" * self.place.is_local) if self.is_file else path

    def list(self) -> Listing:
        """List the files that the value names; of a folder, those with a Parquet suffix that are not hidden."""
        try:
            if self.is_file:
                return list_file(self.place)
            if self.pattern is not None:
                return list_folder(self.place, self.pattern)
            return list_folder(self.place).filter(self._is_data_file)
        except OSError as error:
            raise self.error(one_line(error)) from None

    def _is_data_file(self, path: str) -> bool:
        return path.lower().endswith(SUFFIXES) and not is_hidden(path[len(self.place.path) :].lstrip("/"))


def _split_glob(text: str, wildcards: str) -> tuple[str, Pattern | None]:
    """Split a glob into its leading folders without wildcards, and the other components; None if it has no wildcards."""
    parts = text.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(wildcards, part)), None)
    if first is None:
        return text, None
    return "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), tuple(part for part in parts[first:] if part)


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
    """Check that the next run would not take output for input, and that no input file is inside the output folder.

    Raises:
        RequestError: names the value or the file.
    """
    if not values[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    for value in values:
        below = relative_parts(path, value.place.path)
        if not value.is_file and below is not None and _covers(value.pattern, below):
            raise RequestError(
                f"--output {output.display}: lies in the input {value.text} and would be scored next time; put it elsewhere"
            )
    inside = next((file for file in found if relative_parts(file, path) is not None), None)
    if inside is not None:
        raise RequestError(f"--output {output.display}: holds the input file {escape_non_utf8(inside)}; put it elsewhere")


def _covers(pattern: Pattern | None, output: tuple[str, ...]) -> bool:
    """True if a folder (None) or a glob could match files in an output folder with these components below it."""
    if pattern is None or "**" in pattern:
        return True
    folders = pattern[:-1]
    return len(output) <= len(folders) and all(fnmatchcase(part, glob) for part, glob in zip(output, folders, strict=False))
