"""Paths and URIs of the command line, resolved to a Location."""

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.location import Location, is_utf8

_PUBLIC_QUERY_KEYS: Final = (
    "blob_storage_authority",
    "dfs_storage_authority",
    "enable_tls",
    "endpoint_override",
    "region",
    "scheme",
)
"""Parts of a URI's query that say where the storage is. All others may be credentials and are never shown."""


def locate(text: str, flag: str, base: Path | None = None) -> Location:
    """Resolve a path or URI; a relative path starts at `base` or at the working folder.

    Raises:
        RequestError: the URI's scheme or host is invalid, or its credentials are missing.
    """
    if "\0" in text or not is_utf8(text):
        raise RequestError(f"{flag} {text}: holds characters that no path can have; write it as UTF-8, without NUL")
    if "://" in text:
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise RequestError(f"{flag} {_without_credentials(text)}: {_hide_keys(one_line(error), text)}") from None
        return Location(filesystem, path.rstrip("/"), _without_credentials(text))
    try:
        path = os.path.normpath((base or Path.cwd()) / Path(text).expanduser())
    except RuntimeError:
        raise RequestError(f"{flag} {text}: there is no home folder of that name") from None
    return Location(pafs.LocalFileSystem(), path, path)


def locate_existing(text: str, flag: str) -> Location:
    """Resolve a path to read from: relative to the working folder, else to where a submitted job writes."""
    here = locate(text, flag)
    try:
        return here if here.exists() else locate(text, flag, output_base_folder())
    except (OSError, ValueError) as error:
        raise RequestError(f"{flag} {here.display}: {one_line(error)}") from None


def locate_empty_output(text: str) -> Location:
    """Resolve `--output` of a command that writes only into an empty folder.

    Raises:
        RequestError: the folder holds files, or cannot be listed.
    """
    output = locate(text, "--output", output_base_folder())
    try:
        if output.files():
            raise RequestError(f"--output {output.display}: is not empty; name another folder")
    except OSError as error:
        raise RequestError(f"--output {output.display}: {one_line(error)}") from None
    return output


def output_base_folder() -> Path:
    """Folder that relative output paths start from: the working folder, or the home folder inside a submitted job.

    `ray job submit --working-dir` runs the driver in a temporary copy of the working folder, and Ray deletes it with all files
    that the job wrote there. Ray 2.60 has no documented way to ask for it: the environment of a job's driver holds only an
    undocumented JSON text, and the runtime context needs a connection, which does not exist yet when paths are checked. The copy
    lies in a folder of this name. tests/storage/test_paths.py fails when a version of Ray changes it.
    """
    here = Path.cwd()
    return Path.home() if "working_dir_files" in here.parts else here


def _without_credentials(uri: str) -> str:
    # First by pattern: a key with a slash that was not written as %2F confuses urlsplit, which would take half of it for a path.
    uri = re.sub(r"^([^:/]+://)[^@?]*:[^@?]*@", r"\1", uri)
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0] + "://…"
    user, _, host = parts.netloc.rpartition("@")
    # A user without a password is a container (Azure) or "anonymous" (Google): part of the address.
    address = f"{user}@{host}" if user and parts.scheme != "s3" else host
    public = {
        key: re.sub(r"^(\w+://)?[^@/]*@", r"\1", value)  # an endpoint may hold user:password@, too
        for key, value in parse_qsl(parts.query)
        if key in _PUBLIC_QUERY_KEYS
    }
    return urlunsplit((parts.scheme, address, parts.path, urlencode(public), ""))


def _hide_keys(text: str, uri: str) -> str:
    """An error message without the keys of the URI that it quotes; with a hint where one of them has a slash."""
    found = re.match(r"[^:/]+://([^@?]*)@", uri)
    keys = found[1] if found else ""
    values = [value for key, value in parse_qsl(uri.partition("?")[2]) if key not in _PUBLIC_QUERY_KEYS or "@" in value]
    text = text.replace(uri, _without_credentials(uri))
    for secret in (keys, *keys.split(":"), *values):
        for spelling in {secret, unquote(secret)} - {""}:
            text = text.replace(spelling, "…")
    return f"{text}; write a / in a key as %2F" if "/" in keys else text
