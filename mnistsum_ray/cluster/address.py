"""TODO cluster.address"""

import os
import re
import socket
from typing import Final

from mnistsum_ray.errors import RequestError

_ANSWER_SECONDS: Final = 3.0

_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of gRPC says first, with empty settings; a server answers with its own settings."""


def check_address(address: str) -> None:
    """Refuse an address that no cluster answers at; Ray itself takes from half a minute to many to say so."""
    if "://" in address:
        raise RequestError(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`, "
            "and Ray Client (ray://) is not supported"
        )
    if _host_and_port(address) is None:
        raise RequestError(f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; correct it, or unset it")
    if not is_gcs(address):
        raise RequestError(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"\[?([^/\]\s]+?)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 65_536 else None


def is_gcs(address: str) -> bool:
    """Whether a server of gRPC answers at HOST:PORT; with TLS, whether anything does."""
    place = _host_and_port(address)
    if place is None:
        return False
    try:
        with socket.create_connection(place, timeout=_ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true", "True"):
                return True
            connection.settimeout(_ANSWER_SECONDS)
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except OSError:
        return False
    return len(answer) >= 4 and answer[3] == 4  # the frame of settings


def accepts_connections(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
