"""Folders and URIs alike: where a path leads, and small files read and written there."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.errors import RequestError, one_line

_PARTIAL: Final = re.compile(r"\.mnistsum-[0-9a-f]{16}\.partial")
"""Name of a file that is being written, or was when its writer was killed. It is short, whatever the file's own name: file
systems allow 255 bytes."""

# A put to one of these shows the whole object or nothing; elsewhere a file is written aside and moved into place.
_WHOLE_PUTS: Final = ("s3", "gcs", "abfs")

# What a URI may say of where its storage is. Whatever else it says may be how to get in, which is nobody else's business.
_SHOWN: Final = ("endpoint_override", "region", "scheme")

_S3_ATTEMPTS: Final = 10
"""With the pauses between them, of up to 20 s, some 50 s."""


class _PatientS3(pafs.S3FileSystem):
    """S3 that outlasts the better part of a minute without answers; Arrow's own gives up after 6 s.

    What is pickled of Arrow's has no retry strategy, and so the workers would have none.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS))

    def __reduce__(self) -> Any:
        return _patient_s3, super().__reduce__()[1]


def _patient_s3(options: dict[str, Any]) -> _PatientS3:
    return _PatientS3(**options)


@dataclass(frozen=True)
class Location:
    """A place on a file system: a local folder or file, or an object store's prefix."""

    filesystem: pafs.FileSystem
    path: str
    display: str
    """What to show a person and to write down: an absolute path, or a URI without keys and passwords."""

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", _join(self.display, name))

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, or on one that is mounted there."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def at(self, path: str) -> "Location":
        """Another path on the same storage; its display leaves out what a URI says beside scheme and path, such as keys."""
        scheme, colon, _ = self.display.partition("://")
        return Location(self.filesystem, path, f"{scheme}://{path}" if colon else path)

    def with_retries(self) -> "Location":
        """The same place, for a run that should outlast a storage that does not answer for a while."""
        if type(self.filesystem) is not pafs.S3FileSystem:
            return self
        return replace(self, filesystem=_patient_s3(*self.filesystem.__reduce__()[1]))

    def s3_options(self) -> dict[str, str]:
        """What boto3 has to be told to reach the same S3; keys that Arrow finds by itself boto3 finds as well."""
        given = self.filesystem.__reduce__()[1][-1] if isinstance(self.filesystem, pafs.S3FileSystem) else {}
        names = {
            "access_key": "aws_access_key_id",
            "secret_key": "aws_secret_access_key",
            "session_token": "aws_session_token",
            "region": "region_name",
        }
        options = {theirs: given[ours] for ours, theirs in names.items() if given.get(ours)}
        endpoint = given.get("endpoint_override")
        if endpoint:
            options["endpoint_url"] = endpoint if "://" in endpoint else f"{given.get('scheme') or 'https'}://{endpoint}"
        return options

    def info(self) -> pafs.FileInfo:
        """The file info; its type is NotFound where nothing is there."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether anything is there: a file, a folder, or on an object store any key below the prefix."""
        return bool(self.info().type != pafs.FileType.NotFound)

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Write a file that appears under its name only when it is complete."""
        if self.filesystem.type_name in _WHOLE_PUTS:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(data)
            return
        folder = self.path.rpartition("/")[0]
        partial = f"{folder}/.mnistsum-{secrets.token_hex(8)}.partial"
        self.filesystem.create_dir(folder)
        try:
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(data)
            self.filesystem.move(partial, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(partial)
            raise

    def modified(self, info: pafs.FileInfo) -> int:
        """When a file here was last modified, in nanoseconds since 1970.

        An object store's listing may know it more finely than its answer for one object, so there to the second.
        """
        exact: int = info.mtime_ns
        return exact if self.is_local else exact - exact % 10**9

    def delete(self) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path)

    def files(self) -> list[pafs.FileInfo]:
        """All files below a folder, in the order of the paths; nothing where it is not there. No link to a folder is followed."""
        if self.is_local:
            return sorted(self.filesystem.get_file_info(list(_local_files(self.path))), key=lambda info: str(info.path))
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = (info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
        return sorted(found, key=lambda info: str(info.path))

    def read_json(self) -> Any:
        """The file's one JSON value.

        Raises:
            ValueError: it is not JSON, or nested too deeply.
        """
        try:
            return json.loads(self.read_bytes())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def write_json(self, value: Any) -> None:
        """Write it as `write_bytes` does; infinite numbers and NaN, which JSON has not, are an error."""
        self.write_bytes((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def is_utf8(path: str) -> bool:
    """Whether a path can be written as UTF-8: what a disk holds may have any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_partial(name: str) -> bool:
    """Whether a file's name, without its folder, is that of an unfinished file of ours."""
    return _PARTIAL.fullmatch(name) is not None


def _local_files(folder: str) -> Iterator[str]:
    for here, _, names in os.walk(folder):
        for name in names:
            path = f"{here.rstrip('/')}/{name}"
            if is_utf8(path) and Path(path).is_file():
                yield path


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
        RequestError: the URI's scheme or host makes no sense, or its credentials are not there.
    """
    if "\0" in text or not is_utf8(text):
        raise RequestError(f"{flag} {text}: holds characters that no path has here; write it as UTF-8, without NUL")
    if "://" in text:
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            said = one_line(error) if _shown(text) == text else "cannot be understood; write a / in a key as %2F"
            raise RequestError(f"{flag} {_shown(text)}: {said}") from None
        return Location(filesystem, path.rstrip("/"), _shown(text))
    try:
        path = os.path.normpath((base or Path.cwd()) / Path(text).expanduser())
    except RuntimeError:
        raise RequestError(f"{flag} {text}: there is no home folder of that name") from None
    return Location(pafs.LocalFileSystem(), path, path)


def locate_existing(text: str, flag: str) -> Location:
    """Like `locate`, for what is to be read: from here, or else from where a submitted job of ours has written it."""
    here = locate(text, flag)
    try:
        return here if here.exists() else locate(text, flag, base_folder())
    except (OSError, ValueError) as error:
        raise RequestError(f"{flag} {here.display}: {one_line(error)}") from None


def empty_folder(text: str) -> Location:
    """Where `--output` leads.

    Raises:
        RequestError: something lies there, or it cannot be looked at.
    """
    output = locate(text, "--output", base_folder())
    try:
        if output.files():
            raise RequestError(f"--output {output.display}: is not empty; name another folder")
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    return output


def _shown(uri: str) -> str:
    # First of all, since a key with a slash in it, which has to be written %2F, is no key to whoever splits a URI.
    uri = re.sub(r"^([^:/]+://)[^@?]*:[^@?]*@", r"\1", uri)
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0] + "://…"
    user, _, host = parts.netloc.rpartition("@")
    # Without a password, it is a container (Azure) or "anonymous" (Google), and part of the place.
    place = f"{user}@{host}" if user and parts.scheme != "s3" else host
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key in _SHOWN])
    return urlunsplit((parts.scheme, place, parts.path, query, ""))
