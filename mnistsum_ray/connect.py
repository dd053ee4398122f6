"""Joining a cluster quietly, or starting one; leaving it without a process left behind."""

import logging
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from mnistsum_ray import signals
from mnistsum_ray.errors import Refusal, last_line, one_line
from mnistsum_ray.reaper import Reaper, is_available

_ANSWER_SECONDS: Final = 3.0

_LEAST_OPEN_FILES: Final = 1024
"""What Ray's processes need, and some room."""

_SOCKET_BYTES: Final = 107
"""The longest path of a Unix socket."""
_RAY_SOCKET: Final = "ray/session_2026-11-26_09-31-28_741951_1234567/sockets/plasma_store"

_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of gRPC says first, with empty settings; a server answers with its own settings."""

_reaper: Reaper | None = None
"""Of the cluster that this process has started."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one.

    Does nothing where this process is connected.

    Raises:
        Refusal: nothing answers at RAY_ADDRESS, or no cluster can be started here.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if connected:
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address not in ("auto", "local"):
        _check_address(address)
        _bring_token_if_asked(address)

    import ray  # a second to import, which a refusal need not wait for
    from ray._private.utils import read_ray_address

    # `ray.init` takes minutes to find out that the cluster which was last started on this machine has been killed.
    last = None if address else read_ray_address()
    alone = address == "local" or (not address and (last is None or not _is_gcs(last)))
    if alone:
        _check_machine()
        _make_token_where_home_cannot_be_written()
    try:
        with signals.held(), _without_working_folder(), _apart() if alone else nullcontext():
            # Without the dashboard a cluster of our own starts seconds earlier; one that is joined keeps its own.
            ray.init(
                address="local" if alone else None, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False
            )
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        what = "Ray cannot be started here" if alone else f"the Ray cluster at {address or last} cannot be joined"
        raise Refusal(f"{what}: {last_line(error)}") from error


def disconnect() -> None:
    """Leave the cluster; one that this process has started ends, with all of its processes."""
    global _reaper
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    if _reaper is not None:
        _reaper.end()
        _reaper = None


@contextmanager
def _apart() -> Iterator[None]:
    """Have Ray's processes that start in the block get no signal that is meant for this one, and not outlive it.

    A closed terminal and `timeout` signal the whole process group: Ray's server would end before the job that still needs it. So
    each has its own session, whose end a reaper sees to.
    """
    global _reaper
    from ray._private import services

    if is_available():
        _reaper = _reaper or Reaper()
    reaper, popen = _reaper, services.ConsolePopen

    class Apart(popen):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, preexec_fn: Any = None, **kwargs: Any) -> None:
            def prepare() -> None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)  # this process holds them just now
                if reaper is not None:
                    reaper.tell_from_child()
                if preexec_fn is not None:
                    preexec_fn()

            super().__init__(*args, preexec_fn=prepare, start_new_session=reaper is not None, **kwargs)
            if reaper is not None:
                reaper.tell(self.pid)

    services.ConsolePopen = Apart
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def _without_working_folder() -> Iterator[None]:
    """Keep the working folder out of the workers' import path, where it is not in this process's own.

    Ray puts it first: a `pandas.py` that lies beside somebody's data would be executed in each worker.
    """
    here = Path.cwd()
    if {"", str(here)} & set(sys.path):
        yield
        return
    os.chdir(Path(__file__).parents[1])
    try:
        yield
    finally:
        os.chdir(here)


def _check_address(address: str) -> None:
    """Refuse an address that no cluster answers at; Ray itself takes from half a minute to many to say so."""
    if "://" in address:
        raise Refusal(
            f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; the dashboard's is for `ray job submit`, "
            "and Ray Client (ray://) is not supported"
        )
    if _host_and_port(address) is None:
        raise Refusal(f"RAY_ADDRESS={address}: must be HOST:PORT, as `ray start` prints it; correct it, or unset it")
    if not _is_gcs(address):
        raise Refusal(f"RAY_ADDRESS={address}: no cluster answers there; correct it, or unset it to start one here")


def _host_and_port(address: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"\[?([^/\]\s]+?)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and 0 < int(match[2]) < 65_536 else None


def _is_gcs(address: str) -> bool:
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


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _bring_token_if_asked(address: str) -> None:
    """Have Ray bring the token of this user to the cluster that RAY_ADDRESS names, if that asks for one.

    Ray does so by itself only where it finds the cluster by itself; and brought to a cluster that asks for none, the token keeps
    that from answering.
    """
    if "RAY_AUTH_MODE" in os.environ or not _has_token():
        return
    from ray._raylet import Config, GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        with _without_stderr():
            GcsClient(address=address)
    except AuthenticationError:
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # it has read the variable already
    except RayError:
        return  # `ray.init` tells what it is


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep what C++ prints from standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        return (Path.home() / ".ray" / "auth_token").is_file()
    except (OSError, RuntimeError):
        return False


def _make_token_where_home_cannot_be_written() -> None:
    """Give a cluster of our own a token in the environment, where Ray could not leave one in the home folder."""
    if _has_token() or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _check_machine() -> None:
    """Refuse to start a cluster where Ray would fail in ways that nobody understands."""
    temporary = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None) or "/tmp"
    if len(os.fsencode(Path(temporary) / _RAY_SOCKET)) > _SOCKET_BYTES:
        raise Refusal(f"the temporary folder {temporary} has too long a path for Ray's sockets; set RAY_TMPDIR=/tmp")
    try:
        with tempfile.TemporaryFile(dir=temporary):
            pass
    except OSError as error:
        raise Refusal(
            f"the temporary folder {temporary} cannot be written ({one_line(error)}); set RAY_TMPDIR to another"
        ) from None
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < _LEAST_OPEN_FILES:
        raise Refusal(f"this process may open just {most} files, and Ray needs more: ulimit -n 8192")
