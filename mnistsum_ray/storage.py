"""Folders and URIs alike: where a path leads, and small files read and written there."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.config import Refusal


@dataclass(frozen=True)
class Location:
    """A place on a file system: a local folder or file, or an object store's prefix."""

    filesystem: pafs.FileSystem
    path: str
    text: str
    """What to show a person and to hand to Ray: an absolute path or a URI."""

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path}/{name}", _join(self.text, name))

    def info(self) -> pafs.FileInfo:
        """The file info; its type is NotFound where nothing is there."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether anything is there: a file, a folder, or on an object store any key below the prefix."""
        return bool(self.info().type != pafs.FileType.NotFound)

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file; a local one appears under its name only when it is complete, as an object does anyway."""
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            target = Path(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            partial.write_bytes(data)
            partial.replace(target)
        else:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _join(text: str, name: str) -> str:
    base, question, query = text.partition("?")
    return f"{base.rstrip('/')}/{name}{question}{query}"


def base_folder() -> Path:
    """Where a relative path to write to starts: the working folder, or the home folder inside a submitted job.

    `ray job submit --working-dir` runs the driver in a temporary copy, and what is written there is lost with it.
    """
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Turn a path or URI of the command line into a Location; a relative path starts from `base`, or from here.

    Raises:
        Refusal: the URI's scheme or host makes no sense, or its credentials are not there.
    """
    if "://" in text:
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise Refusal(f"{flag} {text}: {_one_line(error)}") from None
        return Location(filesystem, path.rstrip("/"), text)
    path = os.path.normpath((base or Path.cwd()) / Path(text).expanduser())
    return Location(pafs.LocalFileSystem(), path, path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
