"""Clients of object stores: their options, keys from the environment, and retries."""

import os
import re
from datetime import timedelta
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from obstore import exceptions  # noqa: TID251
from obstore.store import from_url  # noqa: TID251

from mnistsum_ray.errors import StorageError, shortened

_RETRIES: Final[Any] = {
    "max_retries": 20,  # with waits of 1 to 5 seconds, of 3 in the mean, the timeout comes first
    "retry_timeout": timedelta(seconds=50),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=5)},
}

_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Environment variables that obstore takes the address of an S3 server from."""


@cache
def open_store(bucket: str, query: str) -> Any:
    """The obstore store of a bucket, which takes its keys from the environment.

    StorageError: an option, or a variable of the environment, is wrong.
    """
    given = dict(parse_qsl(query))
    config: Any = {}
    if "region" in given:
        config["region"] = given["region"]
    endpoint = given.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
    if endpoint:
        _check_endpoint(bucket, "endpoint_override", endpoint)
        config["base_url" if bucket.startswith("gs:") else "endpoint"] = endpoint
    elif bucket.startswith("s3:"):
        for name in _ENDPOINTS:
            if name in os.environ:
                _check_endpoint(bucket, name, os.environ[name])
    options: Any = {"client_options": {"allow_http": True}, "retry_config": _RETRIES}
    try:
        return from_url(bucket, config=config, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StorageError(f"{bucket}: {first_line(error)}") from None


def _check_endpoint(bucket: str, name: str, url: str) -> None:
    """Raise StorageError where a server's address is none: on it, obstore would panic.

    The message does not quote it, since it may hold a key.
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number, or too large
        has_host = False
    if not has_host or not re.match(r"https?://[!-~]+$", url):
        raise StorageError(f"{bucket}: {name} must be HOST:PORT or a URL of http or https")


def first_line(error: Exception) -> str:
    """An error's message without the pages that obstore adds for its developers."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    return shortened(text) or type(error).__name__
