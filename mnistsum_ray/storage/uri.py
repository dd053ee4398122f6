"""Paths and URIs as a user gives them, resolved to a Location.

One that holds a key is refused, so that no key can come out.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from mnistsum_ray.errors import RequestError, StorageError
from mnistsum_ray.storage.store import Location, open_store

KEYS_REFUSED: Final = (
    "must have no user info, and no query but region, endpoint_override, scheme and allow_…; "
    "keys belong in the environment, such as AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY or MLFLOW_TRACKING_TOKEN"
)
"""Message on a text that `may_hold_keys`, which it must not quote."""

_PUBLIC_QUERY: Final = re.compile(r"region|endpoint_override|scheme|allow_\w+")

_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}
"""Other names of schemes, and what obstore and Arrow both call them."""


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a path or URI, or raise RequestError.

    A relative path starts at `base` or at the working folder.
    """
    if may_hold_keys(text):
        raise RequestError(f"{flag}: {KEYS_REFUSED}")
    if not text.isprintable():
        raise RequestError(f"{flag} {text}: holds control characters, or is not UTF-8")
    scheme, colon, rest = text.partition("://")
    if not colon or scheme == "file":
        # Unlike pathlib's, it leaves the name of an unknown user as it is.
        path = os.path.expanduser(rest if colon else text)  # noqa: PTH111
        return Location(os.path.normpath((base or Path.cwd()) / path))
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


def empty_output(text: str) -> Location:
    """Resolve `--output` of a command that writes only into an empty folder."""
    output = locate(text, "--output", output_base_folder())
    with as_request_error("--output"):
        if output.files():
            raise RequestError(f"--output {output.display}: is not empty; name another folder")
    return output


@contextmanager
def as_request_error(flag: str) -> Iterator[None]:
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
    """Whether a URI, perhaps mistyped, has user info, or a query that may be a key."""
    address, _, query = text.partition("?")
    if "://" not in address:  # `s3:ID:KEY@bucket`, `s3//ID:KEY@bucket`
        return re.match(r"(\w*//)?\w+:\S*@", text) is not None
    try:
        parts = urlsplit(address)
        _ = parts.port  # ValueError: it is no number, and may be a key
    except ValueError:
        return True
    # The user of Azure is its container.
    if parts.password is not None or (parts.username and not parts.scheme.startswith("abfs")):
        return True
    # A slash in a key ends what is taken for the host and the port: s3://ID:12/3@bucket.
    if ":" in parts.netloc and "@" in parts.path:
        return True
    values = parse_qsl(query, keep_blank_values=True)
    return any("@" in value or not _PUBLIC_QUERY.fullmatch(name) for name, value in values)
