"""Which files `--input` names, and what each is called below the one folder that holds them all."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.data.parquet import SUFFIXES, is_data_file
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.listing import (
    DUPLICATE,
    Listing,
    Pattern,
    in_utf8,
    list_file,
    list_folder,
    list_glob,
    parts_below,
    second_names,
)
from mnistsum_ray.storage.location import Location, locate_existing

FILE_SCHEMA: Final = pa.schema({"name": pa.string(), "size": pa.int64(), "modified": pa.int64()})


@dataclass(frozen=True)
class Inputs:
    """The files to score."""

    root: Location
    """The deepest folder that holds all that was named; names are relative to it."""
    files: pa.Table
    """FILE_SCHEMA, sorted by name: `size` in bytes, `modified` in nanoseconds since 1970."""
    skipped: dict[str, str]
    """Path and reason of what lies in the named folders and is not taken."""
    unusable: dict[str, str]
    """Name and reason of each of the files that cannot be opened, which `files` has too."""


def list_inputs(texts: tuple[str, ...], output: Location) -> Inputs:
    """List what `--input` names.

    Raises:
        RequestError: something that was named is not there, there is no Parquet file, or the output lies in the input.
    """
    named = [_Named(text) for text in texts]
    root = _common_root(named)
    listings = []
    for name in named:
        try:
            listings.append(name.list())
        except (OSError, UnicodeError) as error:
            raise RequestError(f"--input {name.text}: {one_line(error)}") from None
    found: dict[str, pafs.FileInfo | None] = {}
    skipped = {path: why for listing in listings for path, why in listing.skipped.items()}
    for listing in listings:
        infos = listing.file_infos(root)
        found |= {path: infos.get(path) for path in listing.files}
    for path in second_names({path: real for listing in listings for path, real in listing.files.items()}):
        skipped[path] = DUPLICATE
        del found[path]
    if not found:
        there = f" (there are others, such as {in_utf8(min(skipped))})" if skipped else ""
        raise RequestError(
            f"--input {' '.join(name.text for name in named)}: there is no Parquet file ({', '.join(SUFFIXES)}){there}"
        )
    _check_apart(named, listings, found, output)
    rows, unusable = [], {}
    for path, info in sorted(found.items()):
        below = in_utf8(path.removeprefix(root.path).lstrip("/"))
        if info is None:
            unusable[below] = "its name is not UTF-8; rename it"
        rows.append({"name": below, "size": info.size if info else 0, "modified": root.modified(info) if info else 0})
    skipped = {path: why for path, why in skipped.items() if path not in found}
    return Inputs(root, pa.Table.from_pylist(rows, FILE_SCHEMA), skipped, unusable)


class _Named:
    """One value of `--input`: a file, a folder or a glob."""

    def __init__(self, text: str) -> None:
        self.text = text
        # In a URI, a question mark begins the query.
        fixed, self.pattern = _split_glob(text, r"[*\[]" if "://" in text else r"[*?\[]")
        place = locate_existing(text if self.pattern is None else fixed, "--input")
        if self.pattern is not None and "://" not in text and os.path.lexists(text):
            place, self.pattern = locate_existing(text, "--input"), None  # a file whose name looks like a glob
        if place.is_local:
            place = place.at(os.path.realpath(place.path))
        else:
            self.text = "/".join((place.display, *(self.pattern or ())))  # a URI may hold keys
        self.place = place
        try:
            self.info = place.info()
        except OSError as error:
            raise RequestError(f"--input {self.text}: {one_line(error)}") from None
        if self.info.type == pafs.FileType.NotFound:
            raise RequestError(f"--input {self.text}: there is no {place.display}")
        if self.pattern is not None and self.info.type == pafs.FileType.File:
            raise RequestError(f"--input {self.text}: {place.display} is a file, not a folder")

    @property
    def folder(self) -> str:
        """Path of the folder that it is, or lies in."""
        path = self.place.path
        return (path.rpartition("/")[0] or "/" * self.place.is_local) if self.info.type == pafs.FileType.File else path

    def list(self) -> Listing:
        if self.info.type == pafs.FileType.File:
            return list_file(self.place)
        if self.pattern is not None:
            return list_glob(self.place, self.pattern)
        return list_folder(self.place).keep(lambda path: is_data_file(parts_below(path, self.place.path) or ("",)))


def _split_glob(text: str, special: str) -> tuple[str, Pattern | None]:
    """A glob's leading folders without wildcards, and the components after them."""
    parts = text.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(special, part)), None)
    if first is None:
        return text, None
    return "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), tuple(part for part in parts[first:] if part)


def _common_root(named: list[_Named]) -> Location:
    first = named[0]
    folder = first.folder
    for other in named[1:]:
        if not other.place.filesystem.equals(first.place.filesystem):
            raise RequestError(f"--input {other.text}: lies on another storage than {first.text}; score them one after the other")
        folder = os.path.commonpath([folder, other.folder]) if folder and other.folder else ""
    if not folder:
        raise RequestError("--input: the files have no folder or bucket in common; score them one after the other")
    return first.place.at(folder)


def _check_apart(named: list[_Named], listings: list[Listing], found: Iterable[str], output: Location) -> None:
    """See to it that no output will be taken for input, and that no input stands where the output goes."""
    if not named[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    for name, listing in zip(named, listings, strict=True):
        inside = parts_below(path, name.place.path)
        if name.info.type != pafs.FileType.File and inside is not None and _covers(name.pattern, inside):
            raise RequestError(
                f"--output {output.display}: lies in the input {name.text} and would be scored next time; put it elsewhere"
            )
        link = next((link for link, real in listing.links.items() if parts_below(path, real) is not None), None)
        if link is not None:
            raise RequestError(
                f"--output {output.display}: lies in the input {name.text}, by the link {in_utf8(link)}, and would be scored next "
                "time; put it elsewhere, or remove the link"
            )
    held = next((file for file in found if parts_below(file, path) is not None), None)
    if held is not None:
        raise RequestError(f"--output {output.display}: holds the input file {in_utf8(held)}; put it elsewhere")


def _covers(pattern: Pattern | None, output: tuple[str, ...]) -> bool:
    """Whether a folder (None) or a glob could match files in an output folder at this place below it."""
    if pattern is None or "**" in pattern:
        return True
    folders = pattern[:-1]
    return len(output) <= len(folders) and all(fnmatchcase(part, glob) for part, glob in zip(output, folders, strict=False))
