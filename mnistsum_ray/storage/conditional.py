"""Conditional writes to S3: only if an object is absent, or only if it is unchanged. A lease is made of them.

Arrow's file systems do not have them, so these go through boto3 (`If-None-Match`, `If-Match`).
"""

import functools
from importlib.util import find_spec
from typing import Any, Final

import pyarrow.fs as pafs

from mnistsum_ray.errors import one_line
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.s3 import boto3_options

_ATTEMPTS: Final = 10

_CONFLICT_CODES: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_UNSUPPORTED_CODES: Final = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest"})
_MISSING_CODES: Final = frozenset({"NoSuchKey", "404"})


class ConflictError(OSError):
    """The condition does not hold: another run has written or deleted the object."""


class UnsupportedError(OSError):
    """The storage does not support conditional writes."""


def unsupported_reason(place: Location) -> str | None:
    """Why this storage certainly has no conditional writes; None where they can be tried."""
    if not isinstance(place.filesystem, pafs.S3FileSystem):
        return f"{place.filesystem.type_name} storage is written without them here"
    if find_spec("boto3") is None:
        return "boto3 is not installed: pip install -e '.[s3]'"
    return None


def put_if_absent(place: Location, data: bytes) -> str:
    """Write an object that does not exist yet; returns its ETag.

    Raises:
        ConflictError: it exists.
        UnsupportedError: the storage does not support this.
        OSError: the storage does not answer, or refuses.
    """
    return _put(place, data, IfNoneMatch="*")


def put_if_match(place: Location, data: bytes, etag: str) -> str:
    """Replace the object that has this ETag; returns the new ETag.

    Raises:
        ConflictError: it has another ETag by now, or is gone.
        UnsupportedError, OSError: as above.
    """
    return _put(place, data, IfMatch=etag)


def get(place: Location) -> tuple[bytes, str] | None:
    """An object's bytes and its ETag; None where it does not exist."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client, bucket, key = _client_of(place)
        found = client.get_object(Bucket=bucket, Key=key)
        return found["Body"].read(), found["ETag"]
    except ClientError as error:
        if _code(error) in _MISSING_CODES:
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
        if _code(error) in _CONFLICT_CODES or ("IfMatch" in condition and _code(error) in _MISSING_CODES):
            raise ConflictError(f"{place.display} was written by another") from error
        if _code(error) in _UNSUPPORTED_CODES:
            raise UnsupportedError(one_line(error)) from error
        raise OSError(one_line(error)) from error
    except BotoCoreError as error:
        raise OSError(one_line(error)) from error
    return etag


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _client_of(place: Location) -> tuple[Any, str, str]:
    bucket, _, key = place.path.partition("/")
    return _client(**boto3_options(place.filesystem)), bucket, key


@functools.cache
def _client(**options: str) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        request_checksum_calculation="when_required",  # stores other than Amazon's may not know the newer checksums
        response_checksum_validation="when_required",
    )
    return boto3.client("s3", config=config, **options)
