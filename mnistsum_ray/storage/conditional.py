"""Writes that an object store carries out only if nobody else was faster: what a lock there is made of.

Arrow's filesystems have none. S3 has them (`If-None-Match`, `If-Match`), through boto3.
"""

import functools
from importlib.util import find_spec
from typing import Any, Final

import pyarrow.fs as pafs

from mnistsum_ray.errors import one_line
from mnistsum_ray.storage.location import Location

_ATTEMPTS: Final = 10

_CONFLICTS: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_UNKNOWN: Final = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest"})


class ConflictError(OSError):
    """Somebody else has written the object."""


class UnsupportedError(OSError):
    """The storage does not know conditional writes."""


def why_not(place: Location) -> str | None:
    """Why conditional writes cannot be had for this storage; None where they can be tried."""
    if not isinstance(place.filesystem, pafs.S3FileSystem):
        return f"{place.filesystem.type_name} storage is written without them here"
    if find_spec("boto3") is None:
        return "boto3 is not installed: pip install -e '.[s3]'"
    return None


def put_if_absent(place: Location, data: bytes) -> str:
    """Write an object that is not there yet; its ETag.

    Raises:
        ConflictError: it is there.
        UnsupportedError, OSError: the storage cannot do this, or does not answer.
    """
    return _put(place, data, IfNoneMatch="*")


def put_if_same(place: Location, data: bytes, etag: str) -> str:
    """Write an object in place of the one with this ETag; the new ETag.

    Raises:
        ConflictError: it is another one by now, or gone.
        UnsupportedError, OSError: as above.
    """
    return _put(place, data, IfMatch=etag)


def get(place: Location) -> tuple[bytes, str] | None:
    """An object and its ETag; None where it is not there."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client, bucket, key = _client_of(place)
        found = client.get_object(Bucket=bucket, Key=key)
        return found["Body"].read(), found["ETag"]
    except ClientError as error:
        if _code(error) in ("NoSuchKey", "404"):
            return None
        raise OSError(one_line(error)) from error
    except BotoCoreError as error:
        raise OSError(one_line(error)) from error


def _put(place: Location, data: bytes, **condition: str) -> str:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client, bucket, key = _client_of(place)
        etag: str = client.put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
    except ClientError as error:
        if _code(error) in _CONFLICTS or ("IfMatch" in condition and _code(error) in ("NoSuchKey", "404")):
            raise ConflictError(f"{place.display} was written by another") from error
        if _code(error) in _UNKNOWN:
            raise UnsupportedError(one_line(error)) from error
        raise OSError(one_line(error)) from error
    except BotoCoreError as error:
        raise OSError(one_line(error)) from error
    return etag


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _client_of(place: Location) -> tuple[Any, str, str]:
    bucket, _, key = place.path.partition("/")
    return _client(**place.s3_options()), bucket, key


@functools.cache
def _client(**options: str) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        request_checksum_calculation="when_required",  # other stores than Amazon's do not know the newer checksums
        response_checksum_validation="when_required",
    )
    return boto3.client("s3", config=config, **options)
