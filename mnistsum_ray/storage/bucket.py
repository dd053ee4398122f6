"""Object stores as obstore and Arrow see them: options, secrets, and retries."""

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from obstore import exceptions  # noqa: TID251
from obstore.store import from_url  # noqa: TID251

from mnistsum_ray.errors import StorageError, shortened

if TYPE_CHECKING:
    from mnistsum_ray.storage.store import Location

_RETRIES: Final[Any] = {
    "max_retries": 20,  # with waits of 1 to 5 seconds, of 3 in the mean, the timeout comes first
    "retry_timeout": timedelta(seconds=50),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=5)},
}

_ENDPOINT: Final = re.compile(
    r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[!-~]*)?", re.ASCII
)

_ENDPOINT_VARIABLES: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_METADATA_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "abfs": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables of the environment that obstore reads, by the scheme of the URI."""


@cache
def open_store(bucket: str, query: str) -> Any:
    """The obstore store of a bucket, which takes its secrets from the environment.

    StorageError: an option, or a variable of the environment, is wrong.
    """
    scheme, given = bucket.partition(":")[0], dict(parse_qsl(query))
    config: Any = {"region": given["region"]} if "region" in given else {}
    endpoint = given.get("endpoint_override")
    if endpoint:
        if "://" not in endpoint:
            endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
        _check_endpoint(bucket, "endpoint_override", endpoint)
        config["base_url" if scheme == "gs" else "endpoint"] = endpoint
    else:
        for name in _ENDPOINT_VARIABLES[scheme]:
            if name in os.environ:
                _check_endpoint(bucket, name, os.environ[name])
    regions = {"region": given.get("region", "")}
    if scheme == "s3":
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            regions[name] = os.environ.get(name, "")
    for name, region in regions.items():
        if not re.fullmatch(r"[\w-]*", region, re.ASCII):  # obstore would panic on it
            raise StorageError(f"{bucket}: {name} must be a name such as eu-west-1")
    options: Any = {"client_options": {"allow_http": True}, "retry_config": _RETRIES}
    try:
        return from_url(bucket, config=config, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StorageError(f"{bucket}: {first_line(error)}") from None


def _check_endpoint(bucket: str, name: str, url: str) -> None:
    """StorageError: the URL is no server's address. It may hold a secret, and is not quoted."""
    with suppress(ValueError):  # a port of more than 16 bits, or brackets without an address
        urlsplit(url).port  # noqa: B018
        if _ENDPOINT.fullmatch(url):
            return
    # obstore would panic on such a URL.
    raise StorageError(f"{bucket}: {name} must be HOST:PORT or a URL of http or https")


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


def first_line(error: Exception) -> str:
    """An error's message without the pages that obstore adds for its developers."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    return shortened(text) or type(error).__name__


def arrow_uri(location: "Location") -> str:
    """An absolute path, or a URI in which Arrow decodes percent signs, as Ray Train takes it."""
    return location.path if location.is_local else location.at(quote(location.path)).display


def arrow_place(location: "Location") -> tuple[Any, str]:
    """The file system of Arrow, and the path in it, as Ray Data takes them.

    StorageError: Arrow does not reach the bucket. For Azure it wants the account in the URI.
    """
    top = location.at("/" if location.is_local else "")
    try:
        file_system, root = _arrow_root(arrow_uri(top))
    except ValueError as error:
        reason = f"Ray, which uses Arrow, does not reach it: {first_line(error)}"
        raise StorageError(f"{top.display}: {reason}") from None
    return file_system, f"{root}/{location.path.lstrip('/')}"


def check_ray_reaches(location: "Location") -> None:
    """StorageError: a training reads or writes by Arrow there, which wants more than obstore.

    That is the account of Azure, which obstore takes from the environment too.
    """
    if location.bucket.startswith("abfs:"):
        arrow_place(location)


@cache
def _arrow_root(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem  # noqa: TID251 - Ray reads and writes by it

    file_system, path = FileSystem.from_uri(uri)
    return file_system, path.rstrip("/")
