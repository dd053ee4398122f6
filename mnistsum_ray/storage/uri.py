"""Paths and URIs as a user gives them. One that holds a key is refused, so that no key can come out anywhere."""

import re
from typing import Final
from urllib.parse import parse_qsl

KEYS_REFUSED: Final = (
    "must have no user info, and no query but region, endpoint_override, scheme and allow_…; keys belong in the environment, "
    "such as AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY or MLFLOW_TRACKING_TOKEN"
)
"""Message on a text that `may_hold_keys`, which it must not quote."""

_ADDRESS: Final = re.compile(r"(abfss?://)[a-z0-9-]+@|(gc?s://)anonymous@")
"""User info that is no key: the container or account of Azure, the word that Google Cloud Storage is read without a key by."""

_HOST: Final = re.compile(r"(\[[\da-fA-F:]+\]|[^:@\[\]]*)(:\d+)?")
_PUBLIC_QUERY: Final = re.compile(r"region|endpoint_override|scheme|allow_\w+")


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
