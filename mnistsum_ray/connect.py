"""Joining a cluster quietly, or starting one."""

import logging
import os
import re
import socket
import sys
from typing import Final

from mnistsum_ray.config import Refusal

_ANSWER_SECONDS: Final = 3.0


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one.

    Does nothing where this process is connected.

    Raises:
        Refusal: nothing answers at RAY_ADDRESS.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if connected:
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and not _is_alive(address):
        raise Refusal(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")

    import ray  # a second to import, which a refusal need not wait for
    from ray._private.utils import read_ray_address

    # `ray.init` takes minutes to find out that the cluster which was last started on this machine has been killed.
    last = None if address else read_ray_address()
    gone = last is not None and not _is_alive(last)
    # Without the dashboard a cluster of our own starts seconds earlier; one that is joined keeps its own.
    ray.init(address="local" if gone else None, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)


def _is_alive(address: str) -> bool:
    """Whether something listens at HOST:PORT; True for the other forms of an address, which Ray has to judge."""
    match = re.fullmatch(r"\[?([^/\]]+?)\]?:(\d+)", address)
    return match is None or answers(match[1], int(match[2]))


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
