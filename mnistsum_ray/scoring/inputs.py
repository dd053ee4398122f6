"""Which files `--input` names, and what each is called below the one folder that holds them all."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.config import Refusal, one_line
from mnistsum_ray.storage import Location, locate_existing

SUFFIXES: Final = (".parquet", ".pq", ".parq")
"""What of a folder is taken. A file that is named, or matched by a glob, is taken whatever it is called."""

FILE_SCHEMA: Final = pa.schema({"name": pa.string(), "size": pa.int64(), "modified": pa.int64()})


@dataclass(frozen=True)
class Inputs:
    """The files to score."""

    root: Location
    """The deepest folder that holds all that was named; names are relative to it."""
    files: pa.Table
    """FILE_SCHEMA, sorted by name: `size` in bytes, `modified` in nanoseconds since 1970."""
    left_aside: tuple[str, ...]
    """Paths in the named folders that are not taken, for their names."""


def list_inputs(texts: tuple[str, ...], output: Location) -> Inputs:
    """List what `--input` names.

    Raises:
        Refusal: something that was named is not there, there is no Parquet file, or the output lies in the input.
    """
    named = [_Named(text) for text in texts]
    root = _common_root(named)
    found: dict[str, pafs.FileInfo] = {}
    aside: set[str] = set()
    for name in named:
        try:
            for info in name.list():
                if name.takes(info.path):
                    found[info.path] = info
                else:
                    aside.add(info.path)
        except (OSError, UnicodeError) as error:
            raise Refusal(f"--input {name.text}: {one_line(error)}") from None
    if not found:
        there = f" (there are others, such as {min(aside)})" if aside else ""
        raise Refusal(f"--input {' '.join(name.text for name in named)}: there is no Parquet file ({', '.join(SUFFIXES)}){there}")
    _check_apart(named, found, output)
    rows = [
        {"name": path.removeprefix(root.path).lstrip("/"), "size": info.size, "modified": root.modified(info)}
        for path, info in sorted(found.items())
    ]
    return Inputs(root, pa.Table.from_pylist(rows, FILE_SCHEMA), tuple(sorted(aside - found.keys())))


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
            self.text = "/".join((place.text, *(self.pattern or ())))  # a URI may hold keys
        self.place = place
        try:
            self.info = place.info()
        except OSError as error:
            raise Refusal(f"--input {self.text}: {one_line(error)}") from None
        if self.info.type == pafs.FileType.NotFound:
            raise Refusal(f"--input {self.text}: there is no {place.text}")

    @property
    def folder(self) -> str:
        """Path of the folder that it is, or lies in."""
        return self.place.path.rpartition("/")[0] if self.info.type == pafs.FileType.File else self.place.path

    def list(self) -> Iterator[pafs.FileInfo]:
        if self.info.type == pafs.FileType.File:
            yield self.info
        else:
            yield from self.place.files()

    def takes(self, path: str) -> bool:
        if self.info.type == pafs.FileType.File:
            return True
        below = PurePosixPath(path.removeprefix(self.place.path).lstrip("/")).parts
        if self.pattern is not None:
            return _matches(below, self.pattern)
        # By the convention of Spark, Hive and Arrow, such names are for what is not data, or not yet.
        return path.lower().endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in below)


def _split_glob(text: str, special: str) -> tuple[str, tuple[str, ...] | None]:
    """A glob's leading folders without wildcards, and the components after them."""
    parts = text.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(special, part)), None)
    if first is None:
        return text, None
    return "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), tuple(parts[first:])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """As a shell matches: `**` stands for any number of folders, a wildcard for no leading dot."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatchcase(parts[0], pattern[0])
        and parts[0].startswith(".") <= pattern[0].startswith(".")
        and _matches(parts[1:], pattern[1:])
    )


def _common_root(named: list[_Named]) -> Location:
    first = named[0]
    folder = first.folder
    for other in named[1:]:
        if not other.place.filesystem.equals(first.place.filesystem):
            raise Refusal(f"--input {other.text}: lies on another storage than {first.text}; score them one after the other")
        folder = os.path.commonpath([folder, other.folder]) if folder and other.folder else ""
    if not folder:
        raise Refusal("--input: the files have no folder or bucket in common; score them one after the other")
    return first.place.at(folder)


def _check_apart(named: list[_Named], found: Iterable[str], output: Location) -> None:
    """See to it that no output will be taken for input, and that no input stands where the output goes."""
    if not named[0].place.filesystem.equals(output.filesystem):
        return
    path = os.path.realpath(output.path) if output.is_local else output.path
    for name in named:
        inside = _below(path, name.place.path)
        if name.info.type != pafs.FileType.File and inside is not None and _covers(name.pattern, inside):
            raise Refusal(
                f"--output {output.text}: lies in the input {name.text} and would be scored next time; put it elsewhere"
            )
    held = next((file for file in found if _below(file, path) is not None), None)
    if held is not None:
        raise Refusal(f"--output {output.text}: holds the input file {held}; put it elsewhere")


def _below(path: str, folder: str) -> tuple[str, ...] | None:
    """The components of a path below a folder, or None where it is not below it."""
    if path == folder:
        return ()
    return PurePosixPath(path[len(folder) :]).parts[1:] if path.startswith(folder.rstrip("/") + "/") else None


def _covers(pattern: tuple[str, ...] | None, output: tuple[str, ...]) -> bool:
    """Whether a folder (None) or a glob could match files in an output folder at this place below it."""
    if pattern is None or "**" in pattern:
        return True
    folders = pattern[:-1]
    return len(output) <= len(folders) and all(fnmatchcase(part, glob) for part, glob in zip(output, folders, strict=False))
