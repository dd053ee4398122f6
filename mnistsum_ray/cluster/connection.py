"""Join a Ray cluster, or start one on this machine, as `ray.init` does; its errors in one line.

Ray takes a second to import, and a request that is refused early needs none of it: so the
functions import it.
"""

import logging
import os
import re
import socket
import sys
from typing import Any, Final

from mnistsum_ray.cluster.stop import preserve_signal_handlers
from mnistsum_ray.errors import RequestError, TryAgainError, one_line, root_cause, shortened

_TIMEOUT_SECONDS: Final = 3.0

_CRASHED: Final = "if it has crashed, `ray stop` removes what is left of it; RAY_ADDRESS=local starts one here"

_INIT: Final[dict[str, Any]] = {"log_to_driver": False, "logging_level": logging.ERROR}
"""Options of `ray.init`: the jobs report their progress themselves."""

_started: str | None = None
"""Address of the cluster that this process has started."""


def connect(metadata: dict[str, str] | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, or of this machine; without one, start one. Idempotent.

    The dashboard of a joined cluster shows `metadata`, unless the job was submitted.

    Raises:
        TryAgainError: no cluster answers, or Ray does not start in time.
        RequestError: RAY_ADDRESS is no address, the cluster has another token or other versions, or
            Ray cannot write its files here.
    """
    import ray

    from mnistsum_ray.cluster.ray_internals import last_cluster_address

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or None
    # `ray.init` tries for minutes to reach a cluster that is gone.
    if address in (None, "auto"):
        last = last_cluster_address()
        answers = last is not None and can_connect(*_host_and_port(last))
        if address == "auto" and last and not answers:
            raise TryAgainError(f"RAY_ADDRESS=auto: the last cluster, at {last}, does not answer; {_CRASHED}")
        if address is None and not answers:
            address = "local"
    elif address != "local" and not can_connect(*_host_and_port(address)):
        raise TryAgainError(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")
    if address == "local":
        _start()
    else:
        _join(address, metadata)


def _start() -> None:
    global _started
    import ray

    try:
        with preserve_signal_handlers():
            ray.init("local", include_dashboard=False, **_INIT)  # the dashboard takes seconds to start
    except Exception as error:  # also plain ones, of a start that takes too long
        problem = f"Ray cannot be started here: {root_cause(error)}"
        # The temporary folder cannot be written, or is too long for the path of a socket.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise RequestError(f"{problem}; RAY_TMPDIR names another temporary folder, such as /tmp") from error
        raise TryAgainError(problem) from error
    _started = ray.get_runtime_context().gcs_address


def _join(address: str | None, metadata: dict[str, str] | None) -> None:
    import ray

    try:
        with preserve_signal_handlers():
            ray.init(address, job_config=ray.job_config.JobConfig(metadata=metadata), **_INIT)
    except Exception as error:
        inner = error.__cause__ or error  # of "Failed to connect"; its text may be a traceback
        cause = root_cause(inner) if "Traceback" in str(inner) else one_line(inner)
        cause = cause.partition(". ")[0]  # Ray's advice follows
        problem = f"the Ray cluster at {address or 'this machine'} cannot be joined: {shortened(cause)}"
        if "Version mismatch" in cause:
            raise RequestError(f"{problem}; install the versions of the cluster here") from error
        if "uthentication" in cause:
            advice = "RAY_AUTH_MODE=token sends the token of RAY_AUTH_TOKEN or ~/.ray/auth_token, which must be the cluster's"
            raise RequestError(f"{problem}; {advice}") from error
        raise TryAgainError(f"{problem}; {_CRASHED}") from error


def started_cluster() -> bool:
    """Whether this process has started the cluster that it is connected to, which is this machine alone."""
    import ray

    return _started is not None and _started == ray.get_runtime_context().gcs_address


def disconnect() -> None:
    """Disconnect from the cluster. One that this process has started ends with its processes."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _host_and_port(address: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([^/\]\s]+?)\]?:(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65_536:
        raise RequestError(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`, "
            "and Ray Client (ray://) is not supported"
        )
    return match[1], int(match[2])


def can_connect(host: str, port: int) -> bool:
    """Whether a server accepts TCP connections at this host and port."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
