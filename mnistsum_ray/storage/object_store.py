"""What Arrow's file systems of object stores lack: conditional writes, and S3 that is retried for long enough.

A conditional write, through obstore, succeeds only where the object is absent, or unchanged: no run replaces what another wrote.
"""

import functools
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import pyarrow.fs as pafs  # noqa: TID251

from mnistsum_ray.errors import ExistingFileError, StorageError, one_line
from mnistsum_ray.storage.uri import masked

Version = dict[str, str]
"""Identifies one state of an object: its ETag, and in Google Cloud Storage its generation."""

# Retries last about 50 s in both clients: Arrow's pauses grow to 20 s. With their defaults they give up after 6 s and after 3 s.
_ARROW_ATTEMPTS: Final = 10
_OBSTORE_RETRIES: Final = {
    "max_retries": 100,
    "retry_timeout": timedelta(seconds=50),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=5), "base": 2},
}


MAX_DELETED: Final = 1000
"""Objects that S3 deletes in one request."""

_DELETE_THREADS: Final = 16


class RetryingS3FileSystem(pafs.S3FileSystem):
    """An S3 file system that keeps its number of attempts on Ray's workers: Arrow does not pickle the retry strategy."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ARROW_ATTEMPTS))
        self._options = options

    def __reduce__(self) -> Any:
        return _retrying_s3, (self._options,)


def _retrying_s3(options: dict[str, Any]) -> RetryingS3FileSystem:
    return RetryingS3FileSystem(**options)


def options_of(filesystem: pafs.FileSystem) -> dict[str, Any]:
    """Keyword arguments that make an equal file system of an object store.

    Only the pickle protocol gives them: a constructor that takes one dict, and that dict. The URI lacks AWS_ENDPOINT_URL and the
    region, for which Arrow asks S3. tests/storage/test_object_store.py fails when a version of pyarrow changes this.
    """
    options: dict[str, Any] = filesystem.__reduce__()[1][0]
    return options


def put(filesystem: pafs.FileSystem, path: str, data: bytes, version: Version | None = None) -> Version:
    """Write an object if it does not exist (None) or has this version; returns the new version.

    Raises:
        ExistingFileError: it exists, or has another version, or is gone. This run may have written it: where an answer is lost,
            the repeated request finds what the first one wrote.
        StorageError: the storage does not answer, refuses, or has no conditional writes; or the extra cloud is not installed.
    """
    mode: Any = version or "create"
    with _storage_errors(path):
        import obstore  # noqa: TID251

        store, key = _store_of(filesystem, path)
        try:
            return _version(obstore.put(store, key, data, mode=mode))
        except FileNotFoundError:
            if version:
                raise ExistingFileError(f"{path} was deleted by another") from None
            raise


def get(filesystem: pafs.FileSystem, path: str) -> tuple[bytes, Version] | None:
    """An object's bytes and its version; None where it does not exist. Raises StorageError as `put` does."""
    with _storage_errors(path):
        import obstore  # noqa: TID251

        store, key = _store_of(filesystem, path)
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            return None
        return bytes(found.bytes()), _version(found.meta)


def delete(filesystem: pafs.FileSystem, paths: list[str]) -> None:
    """Delete at most MAX_DELETED objects of one bucket; missing ones are no error.

    Raises:
        OSError: the storage does not answer, or refuses.
    """
    if filesystem.type_name == "s3":  # Arrow deletes one object in four requests
        with _storage_errors(paths[0]):
            import obstore  # noqa: TID251

            store, _ = _store_of(filesystem, paths[0])
            obstore.delete(store, [path.partition("/")[2] for path in paths])
        return

    def delete_one(path: str) -> None:
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)

    with ThreadPoolExecutor(_DELETE_THREADS) as pool:
        deque(pool.map(delete_one, paths), maxlen=0)  # raises what one of them has raised


def _version(meta: Any) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Raise errors of obstore and boto3 as StorageError, on one line without the query of the URL, which may hold keys."""
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
        raise StorageError(re.sub(r"\?\S*", "", masked(one_line(error)).partition(" Debug source:")[0])) from None


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

    provider: Any = None
    endpoint = given.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{given.get('scheme') or 'https'}://{endpoint}"
    if kind == "s3":
        config = {"region": given.get("region"), "endpoint": endpoint}
        keys = {"access_key_id": given.get("access_key"), "secret_access_key": given.get("secret_key")}
        # Given keys go without the session token of the environment. Others may lie in ~/.aws, which obstore alone does not read.
        provider = _constant(**keys, token=given.get("session_token")) if given.get("access_key") else Boto3CredentialProvider()
    elif kind == "gcs":
        config = {"base_url": endpoint}
        if given.get("access_token") or given.get("anonymous"):
            provider = _constant(token=given.get("access_token", ""))
    else:
        account, authority = given["account_name"], given["blob_storage_authority"]
        address = f"{account}{authority}" if authority.startswith(".") else f"{authority}/{account}"
        config = {name: given.get(name) for name in ("account_name", "account_key", "client_id", "client_secret", "tenant_id")}
        config |= {"sas_key": given.get("sas_token"), "endpoint": f"{given['blob_storage_scheme']}://{address}"}
    store: Any = {"s3": S3Store, "gcs": GCSStore, "abfs": AzureStore}[kind]
    return store(
        bucket,
        config={name: value for name, value in config.items() if value},
        credential_provider=provider,
        client_options={"allow_http": True},
        retry_config=_OBSTORE_RETRIES,
    )


def _constant(**keys: str | None) -> Any:
    """A credential provider of obstore with keys that do not expire."""
    return lambda: keys | {"expires_at": None}
