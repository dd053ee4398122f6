"""Join a Ray cluster, or start one on this machine; disconnect without leaving processes, files or a token behind."""

import logging
import os
import re
import resource
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.cluster.stop import preserve_signal_handlers
from mnistsum_ray.errors import RequestError, one_line, root_cause

_TIMEOUT_SECONDS: Final = 3.0

_HTTP2_SETTINGS: Final = b"\x04"
"""Type of a SETTINGS frame, in byte 3 of its 9."""
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _HTTP2_SETTINGS + bytes(5)
"""First bytes of a gRPC client: the preface and an empty SETTINGS frame. A server answers with its own SETTINGS frame."""

_MIN_OPEN_FILES: Final = 1024
"""Enough for Ray's processes, with some room."""
_MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
_RAY_SOCKET: Final = "ray/session_2026-11-26_09-31-28_741951_1234567/sockets/plasma_store"
"""Ray's longest socket path below the temporary folder."""

_session: Path | None = None
"""Session folder of the cluster that this process has started."""


def connect(metadata: dict[str, str] | None = None) -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; without one, start one. Idempotent.

    The environment, the signal handlers, the working folder and the level of Ray's logger are afterwards what they were before.

    Args:
        metadata: what the dashboard of a joined cluster shows of this job; of a submitted one it shows those of `ray job submit`.

    Raises:
        RequestError: no cluster answers at RAY_ADDRESS, or no cluster can be started here.
    """
    global _session
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or None
    named_address = None if address in ("auto", "local") else address
    if named_address:
        _check_address(named_address)

    import ray  # takes a second, so an address that is wrong is reported first

    from mnistsum_ray.cluster import ray_internals

    # `ray.init` takes minutes to find out that the last cluster of this machine has been killed, so it is asked here.
    joined = address or ray_internals.last_cluster_address()
    starts_cluster = address == "local" or (not address and (joined is None or not speaks_grpc(joined)))
    if starts_cluster:
        _check_machine()
    try:
        with preserve_signal_handlers(), ray_internals.side_effects_undone():
            _authenticate(None if starts_cluster else named_address, starts_cluster=starts_cluster)
            with ray_internals.ray_processes_in_own_sessions() if starts_cluster else nullcontext():
                context = _in_lasting_thread(
                    ray.init,
                    address="local" if starts_cluster else None,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    job_config=ray.job_config.JobConfig(metadata=metadata),
                    include_dashboard=False,  # a new cluster starts seconds earlier without it; a joined one keeps its own
                )
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        problem = "Ray cannot be started here" if starts_cluster else f"the Ray cluster at {joined} cannot be joined"
        if joined == "auto":
            problem = "RAY_ADDRESS=auto: no running cluster was found"
        raise RequestError(f"{problem}: {root_cause(error)}") from error
    if starts_cluster:
        _session = Path(context.address_info["session_dir"])


def _in_lasting_thread(start: Callable[..., Any], **options: Any) -> Any:
    """Call a function in a thread that lasts as long as the process: Ray's processes die with the thread that started them."""
    if threading.current_thread() is threading.main_thread():
        return start(**options)
    started: Future[Any] = Future()

    def work() -> None:
        try:
            started.set_result(start(**options))
        except BaseException as error:
            started.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=work, daemon=True).start()
    return started.result()


def started_cluster() -> bool:
    """Whether this process has started the cluster that it is connected to, which is this machine alone."""
    return _session is not None


def disconnect(*, keep_logs: bool = False) -> None:
    """Disconnect from the cluster. A cluster that this process has started ends with all of its processes, and its logs go."""
    global _session
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    if _session is not None and not keep_logs:
        shutil.rmtree(_session, ignore_errors=True)
    _session = None


def _authenticate(named_address: str | None, *, starts_cluster: bool) -> None:
    """Set RAY_AUTH_MODE and RAY_AUTH_TOKEN for `ray.init`, which hands them to the processes that it starts.

    A local cluster has a token, because other users of this machine reach its ports, and a user who may submit work to it can do
    what this user can. The token is in the memory of its processes only. Ray would write it to ~/.ray/auth_token, where each
    cluster that the user starts later would find it, ask for it, and reject clients that do not send it. A token that the user
    has is taken for our cluster too, so that tools such as `ray status` may ask it.

    Ray sends a token by itself only to a cluster that it finds without an address. It cannot be sent in every case: a cluster
    that asks for none does not answer a client that sends one. So a cluster at an address is asked first.
    """
    from mnistsum_ray.cluster import ray_internals

    mode = os.environ.get("RAY_AUTH_MODE")
    if starts_cluster and mode in (None, "token") and not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    ray_internals.reload_authentication()
    if named_address and mode is None and _has_token() and ray_internals.rejects_this_client(named_address):
        os.environ["RAY_AUTH_MODE"] = "token"
        ray_internals.reload_authentication()


def _has_token() -> bool:
    variables = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(variables) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111, PTH113 (neither raises)


def _check_address(address: str) -> None:
    """Raise RequestError if no cluster answers at RAY_ADDRESS. Ray itself takes half a minute to many minutes to report it."""
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
    """Return whether a gRPC server answers at HOST:PORT, as Ray's head does. With TLS any server counts."""
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
    """Return whether a server accepts TCP connections at this host and port."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def _check_machine() -> None:
    """Raise RequestError if Ray could not start here: it would fail with errors that do not name the cause."""
    temporary = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"
    if len(os.fsencode(Path(temporary) / _RAY_SOCKET)) > _MAX_SOCKET_PATH_BYTES:
        raise RequestError(f"the temporary folder {temporary} has too long a path for Ray's sockets; set RAY_TMPDIR=/tmp")
    try:
        with tempfile.TemporaryFile(dir=temporary):
            pass
    except OSError as error:
        raise RequestError(
            f"the temporary folder {temporary} cannot be written ({one_line(error)}); set RAY_TMPDIR to another"
        ) from None
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # the hard limit: Ray raises the soft one to it
    if limit != resource.RLIM_INFINITY and limit < _MIN_OPEN_FILES:
        raise RequestError(f"this process may open just {limit} files, and Ray needs more: ulimit -n 8192")
