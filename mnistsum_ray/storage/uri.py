"""A path or URI as the user gave it, which shows itself without keys wherever it is printed, formatted, dumped or logged."""

import re
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

_PUBLIC_QUERY_KEYS: Final = (
    "blob_storage_authority",
    "dfs_storage_authority",
    "enable_tls",
    "endpoint_override",
    "region",
    "scheme",
)
"""Parts of a URI's query that say where the storage is. Others may be credentials, and are never shown."""

_URI: Final = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]*[^\s'\"<>;:,.)]")
"""A URI in a text."""


class PathOrUri(str):
    """A path or URI. As a string it is the masked text."""

    def __new__(cls, text: str) -> "PathOrUri":
        if isinstance(text, cls):
            return text
        made = super().__new__(cls, _without_keys(text) if "://" in text else text)
        made._text = text
        return made

    _text: str

    def __getnewargs__(self) -> Any:
        return (self._text,)

    def reveal(self) -> str:
        """The text as it was given, with its keys, for `locate` alone."""
        return self._text

    @property
    def has_keys(self) -> bool:
        """Whether a part of it is not shown."""
        return self._text != str(self)

    def hide(self, message: str) -> str:
        """An error message without the keys of this URI, which it may quote; with a hint where one of them has a slash."""
        found = re.match(r"[^:/]+://([^@?]*)@", self._text)
        keys = found[1] if found else ""
        query = parse_qsl(self._text.partition("?")[2])
        values = [value for key, value in query if key not in _PUBLIC_QUERY_KEYS or "@" in value]
        message = message.replace(self._text, self)
        for secret in (keys, *keys.split(":"), *values):
            for spelling in {secret, unquote(secret)} - {""}:
                message = message.replace(spelling, "…")
        return f"{message}; write a / in a key as %2F" if "/" in keys else message

    def split_glob(self) -> tuple["PathOrUri", tuple[str, ...] | None]:
        """The leading folders without wildcards, and the other components of a glob; None if there are no wildcards.

        In a URI a question mark begins the query, which belongs to the folders, and is no wildcard.
        """
        path, question, query = self._text.partition("?") if "://" in self._text else (self._text, "", "")
        parts = path.split("/")
        wildcards = r"[*\[]" if "://" in path else r"[*?\[]"
        first = next((index for index, part in enumerate(parts) if re.search(wildcards, part)), None)
        if first is None:
            return self, None
        folder = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
        return PathOrUri(folder + question + query), tuple(part for part in parts[first:] if part)


def masked(text: str) -> str:
    """Any text with the URIs in it as a PathOrUri shows them."""
    return _URI.sub(lambda uri: _without_keys(uri[0]), text) if "://" in text else text


def _without_keys(uri: str) -> str:
    # First by pattern: a key with a slash that was not written as %2F confuses urlsplit, which would take half of it for a path.
    uri = re.sub(r"^([^:/]+://)[^@?]*:[^@?]*@", r"\1", uri)
    try:
        parts = urlsplit(uri)
    except ValueError:
        return uri.partition("://")[0] + "://…"
    user, _, host = parts.netloc.rpartition("@")
    # A user without a password is a container (Azure) or "anonymous" (Google): part of the address.
    address = f"{user}@{host}" if user and parts.scheme not in ("s3", "http", "https") else host
    public = {
        key: re.sub(r"^(\w+://)?[^@/]*@", r"\1", value)  # an endpoint may hold user:password@, too
        for key, value in parse_qsl(parts.query)
        if key in _PUBLIC_QUERY_KEYS
    }
    query = f"?{urlencode(public)}" if public else ""
    return f"{parts.scheme}://{address}{parts.path}{query}"
