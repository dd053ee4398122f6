"""What Arrow's file systems of object stores lack: conditional writes, and S3 that is retried for long enough.

A conditional write, through obstore, succeeds only where the object is absent, or unchanged.
"""

import functools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import pyarrow.fs as pafs  # noqa: TID251

from mnistsum_ray.errors import ExistingFileError, StorageError, one_line

Version = dict[str, str]
"""Identifies one state of an object: its ETag, and in Google Cloud Storage its generation."""

# Retries last about 50 s in both clients: Arrow's pauses grow to 20 s.
_OBSTORE_RETRIES: Final = {
    "max_retries": 100,
    "retry_timeout": timedelta(seconds=50),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=5), "base": 2},
}

MAX_DELETED: Final = 1000  # objects in one request to S3


class RetryingS3FileSystem(pafs.S3FileSystem):
    """An S3 file system that keeps its number of attempts on Ray's workers: Arrow does not pickle the retry strategy."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=10))
        self._options = options

    def __reduce__(self) -> Any:
        return RetryingS3FileSystem, (self._options,)


def options_of(filesystem: pafs.FileSystem) -> dict[str, Any]:
    """Keyword arguments that make an equal file system of an object store.

    Only the pickle protocol gives them; tests/storage/test_object_store.py fails when a version of
    pyarrow changes it. The URI lacks AWS_ENDPOINT_URL and the region, for which Arrow asks S3.
    """
    options: dict[str, Any] = filesystem.__reduce__()[1][0]
    return options


def put(filesystem: pafs.FileSystem, path: str, data: bytes, version: Version | None = None) -> Version:
    """Write an object if it does not exist (None) or has this version; returns the new version.

    ExistingFileError: it exists, or has another version. This run may have written it: where an
    answer is lost, the repeated request finds what the first one wrote.
    """
    mode: Any = version or "create"
    with _storage_errors(path):
        store, key = _store_of(filesystem, path)
        return _version(store.put(key, data, mode=mode))


def get(filesystem: pafs.FileSystem, path: str) -> tuple[bytes, Version] | None:
    """An object's bytes and its version; None where it does not exist. Raises StorageError."""
    with _storage_errors(path):
        store, key = _store_of(filesystem, path)
        try:
            found = store.get(key)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()), _version(found.meta)


def delete(filesystem: pafs.FileSystem, paths: list[str]) -> None:
    """Delete at most MAX_DELETED files; missing ones are no error. OSError: the storage fails."""
    if filesystem.type_name == "s3":  # Arrow deletes one object in four requests
        with _storage_errors(paths[0]):
            store, _ = _store_of(filesystem, paths[0])
            store.delete([path.partition("/")[2] for path in paths])
        return

    def delete_one(path: str) -> None:
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(delete_one, paths))  # raises what one of them has raised


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Raise errors of obstore and boto3 as StorageError, on one line without the query of a URL, which may be signed."""
    try:
        yield
    except StorageError:
        raise
    except ImportError as error:
        raise StorageError(f"{error}; writing there needs the extra cloud: pip install -e '.[cloud]'") from None
    except Exception as error:
        from obstore.exceptions import AlreadyExistsError, PreconditionError  # noqa: TID251

        if isinstance(error, (AlreadyExistsError, PreconditionError)):
            raise ExistingFileError(f"{path} was written by another") from None
        raise StorageError(re.sub(r"\?\S*", "", one_line(error).partition(" Debug source:")[0])) from None


def _store_of(filesystem: pafs.FileSystem, path: str) -> tuple[Any, str]:
    """The obstore store and the key of a path."""
    if filesystem.type_name not in ("s3", "gcs", "abfs"):
        raise StorageError(f"{filesystem.type_name} storage has no conditional writes")
    bucket, _, key = path.partition("/")
    given = {name: value for name, value in options_of(filesystem).items() if value and isinstance(value, (str, bool))}
    return _open_store(filesystem.type_name, bucket, **given), key


@functools.cache
def _open_store(kind: str, bucket: str, **given: Any) -> Any:
    """The store that Arrow reaches with these options. Keys that are not among them are found where Arrow finds them."""
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: TID251
    from obstore.store import AzureStore, GCSStore, S3Store  # noqa: TID251

    endpoint = given.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{given.get('scheme') or 'https'}://{endpoint}"
    options: dict[str, Any] = {"client_options": {"allow_http": True}, "retry_config": _OBSTORE_RETRIES}
    store: Any
    if kind == "s3":
        store, config = S3Store, {"region": given.get("region"), "endpoint": endpoint}
        options["credential_provider"] = Boto3CredentialProvider()  # obstore alone does not read ~/.aws
    elif kind == "gcs":
        store, config = GCSStore, {"base_url": endpoint}
        if given.get("anonymous"):
            options["credential_provider"] = lambda: {"token": "", "expires_at": None}
    else:
        account, authority = given["account_name"], given["blob_storage_authority"]
        address = f"{account}{authority}" if authority.startswith(".") else f"{authority}/{account}"
        config = {"account_name": account, "account_key": given.get("account_key")}
        store, config["endpoint"] = AzureStore, f"{given['blob_storage_scheme']}://{address}"
    return store(bucket, config={name: value for name, value in config.items() if value}, **options)
