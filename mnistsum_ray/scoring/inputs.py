"""Input files: which files `--input` names, and the name of each relative to their common folder."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data.parquet import SUFFIXES
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.scoring.input_value import InputValue
from mnistsum_ray.storage.globbing import Pattern
from mnistsum_ray.storage.listing import DUPLICATE, Listing, duplicate_paths, escape_non_utf8, relative_parts
from mnistsum_ray.storage.location import Location

FILE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # relative to the folder that was listed
        "size": pa.int64(),  # bytes
        "modified": pa.int64(),  # nanoseconds since 1970
    }
)


@dataclass(frozen=True)
class Inputs:
    """The files to score."""

    root: Location
    """The deepest folder that contains all files."""
    files: pa.Table
    """FILE_SCHEMA, sorted by name; the names are relative to `root`."""
    skipped: dict[str, str]
    """Files in the named folders that are not scored: path and reason."""
    unusable: dict[str, str]
    """Files that cannot be opened: name and reason. `files` lists them too."""


def list_inputs(texts: tuple[str, ...], output: Location) -> Inputs:
    """List the files that the values of `--input` name.

    Raises:
        RequestError: a named file or folder does not exist, there is no Parquet file, or the output is inside the input.
    """
    values = [InputValue(text) for text in texts]
    root = _common_root(values)
    listings = [_list_value(value) for value in values]
    skipped = {path: reason for listing in listings for path, reason in listing.skipped.items()}
    found: dict[str, pafs.FileInfo | None] = {}
    for listing in listings:
        infos = listing.file_infos(root)
        found |= {path: infos.get(path) for path in listing.files}
    for path in duplicate_paths({path: real for listing in listings for path, real in listing.files.items()}):
        skipped[path] = DUPLICATE
        del found[path]
    if not found:
        others = f" (there are others, such as {escape_non_utf8(min(skipped))})" if skipped else ""
        raise RequestError(
            f"--input {' '.join(value.text for value in values)}: there is no Parquet file ({', '.join(SUFFIXES)}){others}"
        )
    _check_output_is_separate(values, listings, found, output)
    rows, unusable = [], {}
    for path, info in sorted(found.items()):
        name = escape_non_utf8(path.removeprefix(root.path).lstrip("/"))
        if info is None:  # Arrow cannot ask for the info of such a path.
            unusable[name] = "its name is not UTF-8; rename it"
        rows.append({"name": name, "size": info.size if info else 0, "modified": root.modified(info) if info else 0})
    skipped = {path: reason for path, reason in skipped.items() if path not in found}
    return Inputs(root, pa.Table.from_pylist(rows, FILE_SCHEMA), skipped, unusable)


def _list_value(value: InputValue) -> Listing:
    try:
        return value.list()
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--input {value.text}: {one_line(error)}") from None


def _common_root(values: list[InputValue]) -> Location:
    """Return the deepest folder that contains all values."""
    first = values[0]
    folder = first.folder
    for other in values[1:]:
        if not other.place.filesystem.equals(first.place.filesystem):
            raise RequestError(f"--input {other.text}: lies on another storage than {first.text}; score them one after the other")
        folder = os.path.commonpath([folder, other.folder]) if folder and other.folder else ""
    if not folder:
        raise RequestError("--input: the files have no folder or bucket in common; score them one after the other")
    return first.place.at(folder)


def _check_output_is_separate(values: list[InputValue], listings: list[Listing], found: Iterable[str], output: Location) -> None:
    """Check that the next run would not take output for input, and that no input file is inside the output folder.

    Raises:
        RequestError: names the value of `--input` or the file.
    """
    if not values[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    for value, listing in zip(values, listings, strict=True):
        below = relative_parts(path, value.place.path)
        if not value.is_file and below is not None and _covers(value.pattern, below):
            raise RequestError(
                f"--output {output.display}: lies in the input {value.text} and would be scored next time; put it elsewhere"
            )
        link = next((link for link, real in listing.links.items() if relative_parts(path, real) is not None), None)
        if link is not None:
            raise RequestError(
                f"--output {output.display}: lies in the input {value.text}, by the link {escape_non_utf8(link)}, and would be "
                "scored next time; put it elsewhere, or remove the link"
            )
    inside = next((file for file in found if relative_parts(file, path) is not None), None)
    if inside is not None:
        raise RequestError(f"--output {output.display}: holds the input file {escape_non_utf8(inside)}; put it elsewhere")


def _covers(pattern: Pattern | None, output: tuple[str, ...]) -> bool:
    """Return whether a folder (None) or a glob could match files in an output folder with these components below it."""
    if pattern is None or "**" in pattern:
        return True
    folders = pattern[:-1]
    return len(output) <= len(folders) and all(fnmatchcase(part, glob) for part, glob in zip(output, folders, strict=False))
