"""Paths and URIs as a user gives them, resolved to a Location. One that holds a key is refused, so that no key can come out."""

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
    "must have no user info, and no query but region, endpoint_override, scheme and allow_…; keys belong in the environment, "
    "such as AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY or MLFLOW_TRACKING_TOKEN"
)
"""Message on a text that `may_hold_keys`, which it must not quote."""

_ADDRESS: Final = re.compile(r"(abfss?://)[a-z0-9-]+@|(gc?s://)anonymous@")
"""User info that is no key: the container or account of Azure, the word that Google Cloud Storage is read without a key by."""

_HOST: Final = re.compile(r"(\[[\da-fA-F:]+\]|[^:@\[\]]*)(:\d+)?")
_PUBLIC_QUERY: Final = re.compile(r"region|endpoint_override|scheme|allow_\w+")


_SCHEMES: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfss"}
"""Schemes of object stores, and what obstore and Arrow both call them."""


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a path or URI, or raise RequestError; a relative path starts at `base` or at the working folder."""
    if may_hold_keys(text):
        raise RequestError(f"{flag}: {KEYS_REFUSED}")
    if not is_utf8(text) or not text.replace("\n", " ").isprintable():
        raise RequestError(f"{flag} {text}: holds characters that no path can have; write it as UTF-8, without NUL")
    scheme, colon, rest = text.partition("://")
    if colon and scheme != "file":
        if scheme not in _SCHEMES:
            raise RequestError(f"{flag} {text}: there is no storage {scheme}://, but s3://, gs:// and abfs://")
        address, _, query = rest.partition("?")
        bucket, _, key = address.partition("/")
        place = Location(key.strip("/"), f"{_SCHEMES[scheme]}://{bucket}", query)
        try:
            open_store(place.bucket, place.query)
        except RequestError as error:
            raise RequestError(f"{flag} {error}") from None
        return place
    try:
        return Location(os.path.normpath((base or Path.cwd()) / Path(rest if colon else text).expanduser()))
    except RuntimeError:
        raise RequestError(f"{flag} {text}: there is no home folder of that name") from None


def locate_existing(text: str, flag: str) -> Location:
    """Resolve a path to read from: relative to the working folder, else to where a submitted job writes."""
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
    folder of this name, which Ray then deletes. tests/storage/test_uri.py fails when Ray changes it.
    """
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here


def may_hold_keys(text: str) -> bool:
    """Whether a path or URI, perhaps with a mistyped scheme, has user info, or a query that may be a key."""
    scheme = re.match(r"[A-Za-z][\w+.-]*:/+", text)
    if scheme is None:
        is_local = re.match(r"[.~]|/(?!/)", text) is not None
        return not is_local and re.search(r":\S*@", text) is not None
    address = _ADDRESS.match(text)
    place, _, query = text[(address or scheme).end() :].partition("?")
    host, _, path = place.partition("/")
    known = _HOST.fullmatch(host)
    if known is None or (known[2] and "@" in path):  # the second: a key with a slash that begins with digits
        return True
    values = parse_qsl(query, keep_blank_values=True)
    return any("@" in value or not _PUBLIC_QUERY.fullmatch(name) for name, value in values)


def split_glob(text: str) -> tuple[str, tuple[str, ...] | None]:
    """The leading folders without wildcards, and the other components of a glob; None if there are no wildcards.

    In a URI a question mark begins the query, which belongs to the folders, and is no wildcard.
    """
    path, question, query = text.partition("?") if "://" in text else (text, "", "")
    pattern = re.search(r"[^/]*[*\[].*" if "://" in text else r"[^/]*[*?\[].*", path, re.DOTALL)
    if pattern is None:
        return text, None
    folder = path[: pattern.start()] or "."
    return folder + question + query, tuple(part for part in pattern[0].split("/") if part)
