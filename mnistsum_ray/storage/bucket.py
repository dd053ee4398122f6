"""Object stores as obstore opens them, and how long it asks them."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, Final
from urllib.parse import parse_qsl

from obstore import exceptions  # noqa: TID251
from obstore.store import from_url  # noqa: TID251

from mnistsum_ray.errors import StorageError, shortened

_RETRIES: Final[Any] = {
    "max_retries": 100,  # with waits of 1 second at least, the timeout comes first
    "retry_timeout": timedelta(seconds=50),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=5)},
}


@cache
def open_store(bucket: str, query: str) -> Any:
    """Return the obstore store of a bucket, which takes its secrets from the environment.

    StorageError: an option, or a variable of the environment, is wrong.
    """
    scheme, given = bucket.partition(":")[0], dict(parse_qsl(query))
    config: Any = {"region": given["region"]} if "region" in given else {}
    endpoint = given.get("endpoint_override")
    if endpoint:
        if "://" not in endpoint:
            endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
        config["base_url" if scheme == "gs" else "endpoint"] = endpoint
    options: Any = {"client_options": {"allow_http": True}, "retry_config": _RETRIES}
    try:
        return from_url(bucket, config=config, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StorageError(f"{bucket}: {first_line(error)}") from None


def ask_again(request: Callable[[], Any]) -> None:
    """Send a request until it is answered.

    obstore repeats requests by itself, but not where a connection is reset while an object is
    created or objects of S3 are deleted.
    """
    until = time.monotonic() + _RETRIES["retry_timeout"].total_seconds()
    while True:
        try:
            request()
            return
        except exceptions.GenericError as error:
            if "HTTP error: " not in str(error) or time.monotonic() > until:
                raise
        time.sleep(1)


def first_line(error: BaseException) -> str:
    """Return an error's message without the pages that obstore adds for its developers."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    return shortened(text) or type(error).__name__
