"""Paths and URIs: as a user gives them, locked by one run, and as Arrow takes them."""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote

from mnistsum_ray.errors import NoAnswerError, RequestError, StorageError, TryAgainError
from mnistsum_ray.storage.bucket import first_line, open_store
from mnistsum_ray.storage.store import Location

_OPTIONS: Final = re.compile("region|scheme|endpoint_override|allow_bucket_(creation|deletion)")
"""What the query of a URI may hold, as Arrow has it; none of it is secret."""

SECRETS_REFUSED: Final = (
    "must have no user info, and no query but region, endpoint_override, scheme and allow_bucket_…;"
    " keys belong in the environment, such as AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS or AZURE_STORAGE_ACCOUNT_KEY"
)
"""Message on a text that `may_hold_secrets`, which it must not quote."""

_USER_INFO: Final = re.compile(
    r"(?<=[:/])/[^/?\s@]*:[^\s@]*@"  # `//ID:SECRET@`, which may hold slashes; or `s3:/ID:…`
    r"|(?<=[:/])(?<!abfs:/)(?<!abfss:/)/[^/?\s@:]+@"  # `//SECRET@`; in Azure it is a container
)

_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}
"""Other names of schemes, and what obstore and Arrow both call them."""


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a URI, or a path from `base` or the working folder, or raise RequestError."""
    if not text:
        raise RequestError(f"{flag}: is empty")  # an unset variable of a shell; "." is this folder
    if may_hold_secrets(text):
        raise RequestError(f"{flag}: {SECRETS_REFUSED}")
    scheme, colon, rest = text.partition("://")
    if not colon or scheme == "file":
        # Not pathlib: the name of an unknown user stays as it is.
        path = os.path.expanduser(rest if colon else text)  # noqa: PTH111
        path = os.path.normpath((base or Path.cwd()) / path)
        return Location("/" + path.lstrip("/"))  # normpath keeps two slashes
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in ("s3", "gs", "abfs"):
        problem = f"there is no storage {scheme}://, but s3://, gs:// and abfs://"
        raise RequestError(f"{flag} {text}: {problem}")
    address, _, query = rest.partition("?")
    bucket, _, key = address.partition("/")
    location = Location(key.strip("/"), f"{scheme}://{bucket}", query)
    with as_request_error(flag):
        open_store(location.bucket, location.query)
    return location


def locate_existing(text: str, flag: str) -> Location:
    """Resolve a path to read from: in the working folder, else where a submitted job writes."""
    here = locate(text, flag)
    with as_request_error(flag):
        return here if here.exists() else locate(text, flag, output_base_folder())


def empty_output(text: str, flag: str = "--output") -> Location:
    """Resolve the output of what writes only into an empty folder; errors name the flag."""
    output = locate(text, flag, output_base_folder())
    with as_request_error(flag):
        if output.files():
            raise RequestError(f"{flag} {output.display}: is not empty; name another folder")
    return output


@contextmanager
def as_request_error(flag: str = "") -> Iterator[None]:
    """Raise a StorageError of the block as RequestError, or as TryAgainError, that names a flag."""
    try:
        yield
    except NoAnswerError as error:
        raise TryAgainError(f"{flag} {error}".lstrip()) from None
    except StorageError as error:
        raise RequestError(f"{flag} {error}".lstrip()) from None


@contextmanager
def folder_lock(folder: Location, flag: str) -> Iterator[None]:
    """Lock a folder on a disk, which is created where it is missing, while the block runs.

    In a store nothing is locked: each attempt writes a folder of its own, each published file is
    whole, and two runs of the same seed publish the same. Two of unlike seeds under one name leave
    the files of both.

    TryAgainError: another run has locked the folder. RequestError: it cannot be written.
    """
    if not folder.is_local:
        yield
        return
    path = Path(folder.path, "_lock")
    with as_request_error(flag), folder.storage_errors("written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        try:
            # Locked until the file is closed, also by a kill.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgainError(
                f"{flag} {folder.display}: another run ({path.read_text()}) is writing there; "
                "wait for it, or choose another"
            ) from None
        file.truncate(0)
        print(socket.gethostname(), os.getpid(), sep=":", end="", file=file, flush=True)
    with file:
        yield


def output_base_folder() -> Path:
    """Return the base of relative output paths: the working folder, or a job's user's home."""
    here = Path.cwd()
    # Where `ray job submit` runs the driver: a copy of the working folder that Ray deletes.
    return Path.home() if "working_dir_files" in here.parts else here


def may_hold_secrets(text: str) -> bool:
    """Return whether a URI has user info, or options that are not known and so may be secret."""
    address, _, query = text.partition("?")
    options = parse_qsl(query, keep_blank_values=True) if "://" in address else []
    is_unknown = any(not _OPTIONS.fullmatch(name) or "@" in value for name, value in options)
    return is_unknown or bool(_USER_INFO.search(text))


def hide_secrets(text: str) -> str:
    """Return the text without the user info of any URI in it, for what is printed."""
    return _USER_INFO.sub("/…@", text)


def arrow_uri(location: Location) -> str:
    """Return an absolute path, or a URI with percent signs encoded for Arrow and Ray Train."""
    return location.path if location.is_local else location.at(quote(location.path)).display


def arrow_place(location: Location) -> tuple[Any, str]:
    """Return the file system of Arrow, and the path in it, as Ray Data takes them.

    StorageError: Arrow does not reach the bucket. For Azure it needs the account in the URI.
    """
    top = location.at("/" if location.is_local else "")
    try:
        file_system, root = _arrow_root(arrow_uri(top))
    except ValueError as error:
        reason = f"Ray, which uses Arrow, does not reach it: {first_line(error)}"
        raise StorageError(f"{top.display}: {reason}") from None
    return file_system, f"{root}/{location.path.lstrip('/')}"


def check_ray_reaches(location: Location) -> None:
    """Raise StorageError if Arrow, by which Ray reads and writes, does not reach the place.

    That is the account of Azure, which obstore takes from the environment too.
    """
    if location.bucket.startswith("abfs:"):
        arrow_place(location)


@cache
def _arrow_root(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem  # noqa: TID251 - Ray reads and writes by it

    file_system, path = FileSystem.from_uri(uri)
    return file_system, path.rstrip("/")
