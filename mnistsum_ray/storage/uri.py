"""Paths and URIs as a user gives them, resolved to a Location.

One that holds a key is refused, so that no key can come out.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.store import Location, is_utf8, open_store

KEYS_REFUSED: Final = (
    "must have no user info, and no query but region, endpoint_override, scheme and allow_…; "
    "keys belong in the environment, such as AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY or MLFLOW_TRACKING_TOKEN"
)
"""Message on a text that `may_hold_keys`, which it must not quote."""

_AZURE: Final = re.compile(r"abfss?://[a-z0-9-]+@")
"""The container or account of Azure, which is no key."""

_PUBLIC_QUERY: Final = re.compile(r"region|endpoint_override|scheme|allow_\w+")

_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}
"""Other names of schemes, and what obstore and Arrow both call them."""


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a path or URI, or raise RequestError.

    A relative path starts at `base` or at the working folder.
    """
    if may_hold_keys(text):
        raise RequestError(f"{flag}: {KEYS_REFUSED}")
    if not is_utf8(text) or not text.replace("\n", " ").isprintable():
        problem = "holds characters that no path can have; write it as UTF-8, without NUL"
        raise RequestError(f"{flag} {text}: {problem}")
    scheme, colon, rest = text.partition("://")
    if colon and scheme != "file":
        return _locate_object(text, flag)
    try:
        path = Path(rest if colon else text).expanduser()
    except RuntimeError:
        raise RequestError(f"{flag} {text}: there is no home folder of that name") from None
    return Location(os.path.normpath((base or Path.cwd()) / path))


def _locate_object(uri: str, flag: str) -> Location:
    scheme, _, rest = uri.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in ("s3", "gs", "abfs"):
        problem = f"there is no storage {scheme}://, but s3://, gs:// and abfs://"
        raise RequestError(f"{flag} {uri}: {problem}")
    address, _, query = rest.partition("?")
    bucket, _, key = address.partition("/")
    location = Location(key.strip("/"), f"{scheme}://{bucket}", query)
    try:
        open_store(location.bucket, location.query)
    except RequestError as error:
        raise RequestError(f"{flag} {error}") from None
    return location


def locate_existing(text: str, flag: str) -> Location:
    """Resolve a path to read from: in the working folder, else where a submitted job writes."""
    here = locate(text, flag)
    with refused(flag):
        return here if here.exists() else locate(text, flag, output_base_folder())


def empty_output(text: str) -> Location:
    """Resolve `--output` of a command that writes only into an empty folder."""
    output = locate(text, "--output", output_base_folder())
    with refused("--output"):
        if output.files():
            raise RequestError(f"--output {output.display}: is not empty; name another folder")
    return output


@contextmanager
def refused(flag: str) -> Iterator[None]:
    """Raise a StorageError of the block as RequestError that names a flag."""
    try:
        yield
    except StorageError as error:
        raise RequestError(f"{flag} {error}") from None


def output_base_folder() -> Path:
    """Folder that relative output paths start from: the working folder, or that of a job's user.

    `ray job submit --working-dir` runs the driver in a temporary copy of the working folder, in a
    folder of this name, which Ray then deletes.
    """
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here


def may_hold_keys(text: str) -> bool:
    """Whether a path or URI, perhaps mistyped, has user info, or a query that may be a key."""
    scheme = re.match(r"[A-Za-z][\w+.-]*:/+", text)
    if scheme is None:
        is_local = re.match(r"[.~]|/(?!/)", text) is not None
        return not is_local and re.search(r":\S*@", text) is not None
    begin = _AZURE.match(text) or scheme
    address, _, query = text[begin.end() :].partition("?")
    host, _, path = address.partition("/")
    has_port = re.search(r":\d+$", host) is not None
    if "@" in host or (":" in host and not has_port):
        return True
    if has_port and "@" in path:  # a key that begins with digits and a slash
        return True
    values = parse_qsl(query, keep_blank_values=True)
    return any("@" in value or not _PUBLIC_QUERY.fullmatch(name) for name, value in values)
