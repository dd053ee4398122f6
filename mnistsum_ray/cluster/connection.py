"""Join a Ray cluster, or start one on this machine; disconnect without leaving processes, files or a token behind."""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mnistsum_ray.cluster.stop import preserve_signal_handlers
from mnistsum_ray.errors import RequestError, one_line, root_cause, shortened

_TIMEOUT_SECONDS: Final = 3.0

_HTTP2_SETTINGS: Final = b"\x04"
"""Type of a SETTINGS frame, in byte 3 of its 9."""
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _HTTP2_SETTINGS + bytes(5)
"""First bytes of a gRPC client: the preface and an empty SETTINGS frame. A server answers with its own SETTINGS frame."""

_ADVICE: Final = {
    "Version mismatch": "install the versions of the cluster here",
    "uthentication": "RAY_AUTH_TOKEN or ~/.ray/auth_token must have the token of the cluster",
    "": "if it has crashed, `ray stop` removes what is left of it; RAY_ADDRESS=local starts one here",
}
"""What to do about an error of `ray.init`, by words in it; the last is for all others."""

_session: Path | None = None
"""Session folder of the cluster that this process has started."""

_start: "Future[None] | None" = None
"""The start of a cluster, until `connect` has waited for it."""


@contextmanager
def started_early() -> Iterator[None]:
    """Begin to start a cluster, where `connect` would start one, while the block reads the request.

    The block should call `connect`, which waits for that cluster. If it raises before, no cluster is started, or it is ended.
    """
    cancelled = threading.Event()
    early = _begin_start(cancelled)
    try:
        yield
    finally:
        if early is not None and early is _start:
            cancelled.set()
            with suppress(RequestError):
                _wait_for_start()
            signal.alarm(0)  # a signal in the last moments of `ray.init` sets one, see `preserve_signal_handlers`
            disconnect()


def connect(metadata: dict[str, str] | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; without one, start one. Idempotent.

    The dashboard of a joined cluster shows `metadata`, unless the job was submitted. The environment, the signal handlers, the
    working folder and the level of Ray's logger are afterwards what they were before.

    Raises:
        RequestError: no cluster answers at RAY_ADDRESS, or no cluster can be started here.
    """
    _begin_start(threading.Event())
    _wait_for_start()
    if is_connected():
        return
    address = os.environ.get("RAY_ADDRESS") or None
    named_address = None if address == "auto" else address
    if named_address:
        _check_address(named_address)

    import ray  # takes a second, so an address that is wrong is reported first

    from mnistsum_ray.cluster import ray_internals

    last = ray_internals.last_cluster_address()
    if address == "auto" and last and not speaks_grpc(last):  # `ray.init` tries for minutes
        raise RequestError(f"RAY_ADDRESS=auto: the last cluster, at {last}, does not answer; {_ADVICE['']}")
    try:
        with preserve_signal_handlers(), ray_internals.side_effects_undone(), ray_internals.without_core_logs():
            _send_token(named_address)
            ray.init(job_config=ray_internals.job_config(metadata), logging_level=logging.ERROR, log_to_driver=False)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        problem = f"the Ray cluster at {address or last} cannot be joined"
        if address == "auto":
            problem = "RAY_ADDRESS=auto: no running cluster was found"
        inner = error.__cause__ or error  # of "Failed to connect"; its text may be a traceback, and ends with Ray's advice
        cause = (root_cause(inner) if "Traceback" in str(inner) else one_line(inner)).partition(". ")[0]
        advice = next(advice for words, advice in _ADVICE.items() if words in cause)
        raise RequestError(f"{problem}: {shortened(cause)}; {advice}") from error


def is_connected() -> bool:
    """Whether this process is connected to a cluster."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _begin_start(cancelled: threading.Event) -> "Future[None] | None":
    """Begin to start a cluster, unless one is to be joined; nothing is started any more once `cancelled` is set.

    A thread does it, which lasts as long as the process: Ray's processes end with the thread that has started them.
    """
    global _start
    address = os.environ.get("RAY_ADDRESS") or None
    if _start is not None or address not in (None, "local") or is_connected():
        return None
    started = _start = Future[None]()

    def work() -> None:
        try:
            if _finds_no_cluster(address) and not cancelled.is_set():
                _start_cluster()
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    return started


def _wait_for_start() -> None:
    """Wait until the cluster that is being started is there, if any. Raises RequestError if it cannot be started."""
    global _start
    started, _start = _start, None
    if started is not None:
        with preserve_signal_handlers():
            started.result()


def _finds_no_cluster(address: str | None) -> bool:
    """Whether there is no cluster on this machine to join. `ray.init` takes minutes to find out that the last one was killed."""
    from mnistsum_ray.cluster import ray_internals

    last = None if address == "local" else ray_internals.last_cluster_address()
    return last is None or not speaks_grpc(last)


def _start_cluster() -> None:
    global _session
    import ray

    from mnistsum_ray.cluster import ray_internals

    try:
        with ray_internals.side_effects_undone(), ray_internals.small_cluster():
            _make_token()
            context = ray.init(
                address="local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                job_config=ray_internals.job_config(None),
                include_dashboard=False,  # it takes seconds to start
            )
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        # The temporary folder cannot be written, or is too long for the path of a socket.
        of_folder = isinstance(error, OSError) and not isinstance(error, ConnectionError)
        advice = "; RAY_TMPDIR names another temporary folder, such as /tmp" if of_folder else ""
        raise RequestError(f"Ray cannot be started here: {root_cause(error)}{advice}") from error
    _session = Path(context.address_info["session_dir"])


def started_cluster() -> bool:
    """Whether this process has started the cluster that it is connected to, which is this machine alone."""
    return _session is not None


def disconnect(*, keep_logs: bool = False) -> None:
    """Disconnect from the cluster. One that this process has started ends with its processes, and its logs are deleted."""
    global _session
    if "ray" in sys.modules:
        from mnistsum_ray.cluster import ray_internals

        sys.modules["ray"].shutdown()
        ray_internals.reload_authentication()  # or the next `ray.init` of this process takes this cluster's token for its own
    if _session is not None and not keep_logs:
        shutil.rmtree(_session, ignore_errors=True)
    _session = None


def _make_token() -> None:
    """Set RAY_AUTH_TOKEN for `ray.init`, which hands it to the processes that it starts.

    A new cluster has a token, since other users of this machine reach its ports. It is the user's, or is in the memory of the
    processes alone: Ray would write it to ~/.ray/auth_token, and each cluster that the user starts later would ask for it.
    """
    from mnistsum_ray.cluster import ray_internals

    if os.environ.get("RAY_AUTH_MODE") in (None, "token") and not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray_internals.reload_authentication()


def _send_token(named_address: str | None) -> None:
    """Set RAY_AUTH_MODE for `ray.init` if the cluster at this address asks for a token.

    Ray sends a token by itself only to a cluster that it finds without an address, and a cluster that asks for none does not
    answer a client that sends one. So a cluster at an address is asked first.
    """
    from mnistsum_ray.cluster import ray_internals

    ray_internals.reload_authentication()
    mode = os.environ.get("RAY_AUTH_MODE")
    if named_address and mode is None and _has_token() and ray_internals.rejects_this_client(named_address):
        os.environ["RAY_AUTH_MODE"] = "token"
        ray_internals.reload_authentication()


def _has_token() -> bool:
    variables = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(variables) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111, PTH113 (neither raises)


def _check_address(address: str) -> None:
    """Raise RequestError if no cluster answers at RAY_ADDRESS: Ray itself takes half a minute to many minutes to report it."""
    if _host_and_port(address) is None:
        raise RequestError(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`, "
            "and Ray Client (ray://) is not supported"
        )
    if not speaks_grpc(address):
        raise RequestError(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"\[?([^/\]\s]+?)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 65_536 else None


def speaks_grpc(address: str) -> bool:
    """Whether a gRPC server answers at HOST:PORT, as Ray's head does. With TLS any server counts."""
    host_and_port = _host_and_port(address)
    if host_and_port is None:
        return False
    try:
        with socket.create_connection(host_and_port, timeout=_TIMEOUT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true", "True"):
                return True
            connection.sendall(_HTTP2_PREFACE)
            return connection.recv(9)[3:4] == _HTTP2_SETTINGS
    except OSError:
        return False


def can_connect(host: str, port: int) -> bool:
    """Whether a server accepts TCP connections at this host and port."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
