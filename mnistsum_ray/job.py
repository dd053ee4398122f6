"""What the jobs share: joining a cluster quietly, one line for a refusal, one JSON line for the result, the exit code."""

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from mnistsum_ray.config import Refusal, RunFailed

DONE: Final = 0
FAILED: Final = 1
REFUSED: Final = 2
INCOMPLETE: Final = 3
"""Finished, but some of the input could not be used."""

_ANSWER_SECONDS: Final = 3.0


def run(job: Callable[[list[str]], tuple[dict[str, Any], int]], argv: list[str]) -> int:
    """Run a job to its exit code: its result is the last line on standard output, a refusal one line on standard error."""
    stdout = sys.stdout
    try:
        result, code = job(argv)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        return REFUSED
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        return FAILED
    print(json.dumps(result, allow_nan=False), file=stdout, flush=True)
    return code


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one.

    From here on standard output is left to the job's last line.

    Raises:
        Refusal: nothing answers at RAY_ADDRESS.
    """
    import ray  # a second to import, which a refusal need not wait for
    from ray._private.utils import read_ray_address

    address = os.environ.get("RAY_ADDRESS")
    if address and not _answers(address):
        raise Refusal(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")
    # `ray.init` takes minutes to find out that the cluster which was last started on this machine has been killed.
    last = None if address else read_ray_address()
    gone = last is not None and not _answers(last)
    # Ray's threads print what happens to workers on standard output, at any time, also after the last line.
    sys.stdout = sys.stderr
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
