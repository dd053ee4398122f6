"""Join a Ray cluster, or start one on this machine, as `ray.init` does; its errors in one line.

Ray takes a second to import, and a request that is refused early needs none of it: so the
functions import it.
"""

import logging
import os
import socket
import sys
from typing import Any, Final

from mnistsum_ray.cluster.stop import defer_signals
from mnistsum_ray.errors import RequestError, TryAgainError, one_line, root_cause, shortened

_TIMEOUT_SECONDS: Final = 3.0

_GONE: Final = "correct it, or `ray stop` if it has crashed; RAY_ADDRESS=local starts one here"
_TEMPORARY: Final = "RAY_TMPDIR names another temporary folder, such as /tmp"
_ADVICE: Final = {
    "Version mismatch": "install the versions of the cluster here",
    "uthentication": "RAY_AUTH_MODE=token sends the token of RAY_AUTH_TOKEN or ~/.ray/auth_token, which must be the cluster's",
}
"""What to do, by what Ray says."""

_started: str | None = None
"""Address of the cluster that this process has started."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or of this machine; without one, start one. Idempotent.

    Raises:
        TryAgainError: no cluster answers, or Ray does not start in time.
        RequestError: RAY_ADDRESS is no address, the cluster has another token or other versions, or
            Ray cannot write its files here.
    """
    global _started
    import ray

    from mnistsum_ray.cluster.workarounds import last_cluster_address

    if ray.is_initialized():
        return
    asked = os.environ.get("RAY_ADDRESS", "")
    address = last_cluster_address() if asked in ("", "auto") else asked
    # `ray.init` tries for minutes to reach a cluster that is gone.
    answers = address not in (None, "local") and _answers(str(address))
    if asked == "local" or not (asked or answers):
        # The dashboard takes seconds to start.
        _init("local", "Ray cannot be started here", include_dashboard=False)
        _started = ray.get_runtime_context().gcs_address
        return
    if address and not answers:
        raise TryAgainError(f"RAY_ADDRESS={asked}: no cluster answers at {address}; {_GONE}")
    _init(address or "auto", f"the Ray cluster at {address or 'this machine'} cannot be joined")


def _init(address: str, problem: str, **options: Any) -> None:
    import ray

    try:
        with defer_signals():
            # The jobs report their progress themselves.
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # also plain ones, of a start that takes too long
        inner = error.__cause__ or error  # of "Failed to connect"; its text may be a traceback
        cause = root_cause(inner) if "Traceback" in str(inner) else one_line(inner)
        problem += f": {shortened(cause.partition('. ')[0])}"  # Ray's advice follows
        for said, advice in _ADVICE.items():
            if said in cause:
                raise RequestError(f"{problem}; {advice}") from error
        # The temporary folder cannot be written, or is too long for the path of a socket.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            raise RequestError(f"{problem}; {_TEMPORARY}") from error
        raise TryAgainError(problem) from error


def started_cluster() -> bool:
    """Whether this process has started the cluster that it is connected to: this machine alone."""
    import ray

    return _started is not None and _started == ray.get_runtime_context().gcs_address


def disconnect() -> None:
    """Disconnect from the cluster. One that this process has started ends with its processes."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise RequestError(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's "
            "is for `ray job submit`, and Ray Client (ray://) is not supported"
        )
    return can_connect(host.strip("[]"), int(port))


def can_connect(host: str, port: int) -> bool:
    """Whether a server accepts TCP connections at this host and port."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
