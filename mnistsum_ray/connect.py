"""Joining a cluster quietly, or starting one."""

import logging
import os
import re
import socket
from typing import Final

from mnistsum_ray.config import Refusal

_ANSWER_SECONDS: Final = 3.0


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one.

    Does nothing where this process is connected.

    Raises:
        Refusal: nothing answers at RAY_ADDRESS.
    """
    import ray  # a second to import, which a refusal need not wait for
    from ray._private.utils import read_ray_address

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and not _answers(address):
        raise Refusal(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")
    # `ray.init` takes minutes to find out that the cluster which was last started on this machine has been killed.
    last = None if address else read_ray_address()
    gone = last is not None and not _answers(last)
    # Without the dashboard a cluster of our own starts seconds earlier; one that is joined keeps its own.
    ray.init(address="local" if gone else None, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT; True for the other forms of an address, which Ray has to judge."""
    match = re.fullmatch(r"\[?([^/\]]+?)\]?:(\d+)", address)
    if match is None:
        return True
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
