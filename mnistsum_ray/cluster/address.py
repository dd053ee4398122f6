"""Check in seconds whether a Ray cluster answers at an address."""

import os
import re
import socket
from typing import Final

from mnistsum_ray.errors import RequestError

_TIMEOUT_SECONDS: Final = 3.0

_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""First bytes of a gRPC client: the HTTP/2 preface and an empty SETTINGS frame. A server answers with its own SETTINGS frame."""

_FRAME_HEADER_BYTES: Final = 9
_SETTINGS_FRAME: Final = 4
"""Type of the frame, in byte 3 of its header."""


def check_address(address: str) -> None:
    """Raise RequestError if no cluster answers at RAY_ADDRESS. Ray itself takes half a minute to many minutes to report it."""
    if "://" in address:
        raise RequestError(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`, "
            "and Ray Client (ray://) is not supported"
        )
    if _host_and_port(address) is None:
        raise RequestError(f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; correct it, or unset it")
    if not speaks_grpc(address):
        raise RequestError(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"\[?([^/\]\s]+?)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 65_536 else None


def speaks_grpc(address: str) -> bool:
    """Return whether a gRPC server answers at HOST:PORT, as Ray's head does. With TLS any server counts."""
    host_and_port = _host_and_port(address)
    if host_and_port is None:
        return False
    try:
        with socket.create_connection(host_and_port, timeout=_TIMEOUT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true", "True"):
                return True
            connection.sendall(_HTTP2_PREFACE)
            header = connection.recv(_FRAME_HEADER_BYTES)
    except OSError:
        return False
    return len(header) >= 4 and header[3] == _SETTINGS_FRAME


def can_connect(host: str, port: int) -> bool:
    """Return whether a server accepts TCP connections at this host and port."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
