"""Join a Ray cluster, or start one on this machine, as `ray.init` does; its errors in one line.

Ray takes a second to import, and a request that is refused early needs none of it: so the
functions import it.
"""

import logging
import os
import re
import signal
import socket
import sys
from typing import Any, Final

from mnistsum_ray.errors import RequestError, TryAgainError, one_line, root_cause, shortened
from mnistsum_ray.task import Task

_TIMEOUT_SECONDS: Final = 3.0
"""Longest wait for a head to accept a connection."""

_ADVICE: Final = {
    "version mismatch": "install the versions of the cluster here",
    "authentication": "RAY_AUTH_MODE=token sends the token of RAY_AUTH_TOKEN or ~/.ray/auth_token, "
    "which must be the cluster's",
}
"""What to do, by what Ray says, in lower case."""

_started: str | None = None
"""Address of the cluster that this process has started."""


def connect() -> str:
    """Join the cluster of RAY_ADDRESS, or of this machine; without one, start one. Idempotent.

    Ray's processes end with the thread that has started them, so a program that calls this from
    threads calls `ray.init()` in its main thread first.

    Returns the console line that says which. TryAgainError: no cluster answers, or Ray does not
    start in time. RequestError: RAY_ADDRESS is no address, or the cluster has another token or
    other versions.
    """
    global _started
    import ray

    from mnistsum_ray.cluster.workarounds import last_cluster_address

    if ray.is_initialized():
        return f"on the Ray cluster at {ray.get_runtime_context().gcs_address}"
    asked = os.environ.get("RAY_ADDRESS", "")
    is_auto = asked in ("", "auto")
    address: str | None = asked
    if is_auto:
        address = last_cluster_address()
    elif asked == "local":  # a cluster of its own
        address = None
    # `ray.init` would try for minutes to reach a cluster that has ended.
    if address and _answers(address):
        # With "auto" Ray sends this machine's token; with HOST:PORT it does not.
        _init("auto" if is_auto else address, f"the Ray cluster at {address} cannot be joined")
        return f"on the Ray cluster at {ray.get_runtime_context().gcs_address}"
    if asked not in ("", "local"):
        raise TryAgainError(
            f"RAY_ADDRESS={asked}: no cluster answers at {address or 'this machine'}; correct "
            "RAY_ADDRESS, or `ray stop` if it has crashed; RAY_ADDRESS=local starts one here"
        )
    # The dashboard takes seconds to start.
    _init("local", "Ray cannot be started here", include_dashboard=False)
    _started = ray.get_runtime_context().gcs_address
    # Each training takes 10 s more, until `ray stop` deletes the address of the ended cluster.
    gone = f"; the last `ray start`, {address}, is gone: `ray stop` forgets it" if address else ""
    return f"started Ray on this machine, for this job alone{gone}"


def _init(address: str, problem: str, **options: Any) -> None:
    import ray

    own_handler = signal.getsignal(signal.SIGTERM)
    try:
        # The jobs report their progress themselves.
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # a start that takes too long raises a plain Exception
        inner = error.__cause__ or error  # "Failed to connect" has one; its text may be a traceback
        cause = root_cause(inner) if "Traceback" in str(inner) else one_line(inner)
        problem += f": {shortened(cause.partition('. ')[0])}"  # Ray's advice follows
        for said, advice in _ADVICE.items():
            if said in cause.lower():
                raise RequestError(f"{problem}; {advice}") from error
        raise TryAgainError(problem) from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not own_handler:  # Ray's prints a stack and aborts
            signal.signal(signal.SIGTERM, own_handler)


def started_cluster() -> bool:
    """Return whether this process started its cluster, which then is this machine alone."""
    import ray

    return ray.is_initialized() and bool(_started == ray.get_runtime_context().gcs_address)


def head_answers() -> bool:
    """Return whether the head of the cluster that this process is connected to still answers."""
    import ray

    # Asked without a cluster, Ray would start one.
    return ray.is_initialized() and _answers(ray.get_runtime_context().gcs_address)


def _answers(address: str) -> bool:
    """Return whether a server accepts TCP connections at this address."""
    host, _, port = address.rpartition(":")
    if not host or re.search("[/@]", host) or not port.isdecimal():
        shown = re.sub(".*@", "…@", address)  # user info may be a secret
        raise RequestError(
            f"RAY_ADDRESS={shown}: must be HOST:PORT, as `ray start` prints it; the dashboard's "
            "is for `ray job submit`, and Ray Client (ray://) is not supported"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError):  # a port of more than 16 bits, a host like a..b
        return False
    return True


def send_by_value(task: type[Task]) -> None:
    """Let Ray send the code of a task to its workers, which may have no such file."""
    from ray import cloudpickle

    module = sys.modules[task.__module__]
    is_installed = "site-packages" in (getattr(module, "__file__", None) or "")
    is_ours = task.__module__.partition(".")[0] == __name__.partition(".")[0]
    if not is_ours and not is_installed and task.__module__ != "__main__":  # which goes by value
        cloudpickle.register_pickle_by_value(module)
