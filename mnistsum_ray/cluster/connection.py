"""Joining a cluster quietly, or starting one; leaving it without a process left behind."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.cluster import signals
from mnistsum_ray.cluster.address import check_address, is_gcs
from mnistsum_ray.cluster.authentication import ensure_token, use_token_if_required
from mnistsum_ray.cluster.reaper import Reaper, is_available
from mnistsum_ray.errors import RequestError, last_line, one_line

_LEAST_OPEN_FILES: Final = 1024
"""What Ray's processes need, and some room."""

_SOCKET_BYTES: Final = 107
"""The longest path of a Unix socket."""
_RAY_SOCKET: Final = "ray/session_2026-11-26_09-31-28_741951_1234567/sockets/plasma_store"

_reaper: Reaper | None = None
"""Of the cluster that this process has started."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, of this submitted job or of this machine; where there is none, start one.

    Does nothing where this process is connected.

    Raises:
        RequestError: nothing answers at RAY_ADDRESS, or no cluster can be started here.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if connected:
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address not in ("auto", "local"):
        check_address(address)
        use_token_if_required(address)

    import ray  # a second to import, which a refusal need not wait for
    from ray._private.utils import read_ray_address

    # `ray.init` takes minutes to find out that the cluster which was last started on this machine has been killed.
    last = None if address else read_ray_address()
    alone = address == "local" or (not address and (last is None or not is_gcs(last)))
    if alone:
        _check_machine()
        ensure_token()
    try:
        with signals.handlers_preserved(), _without_working_folder(), _isolated_sessions() if alone else nullcontext():
            # Without the dashboard a cluster of our own starts seconds earlier; one that is joined keeps its own.
            ray.init(
                address="local" if alone else None, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False
            )
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        what = "Ray cannot be started here" if alone else f"the Ray cluster at {address or last} cannot be joined"
        raise RequestError(f"{what}: {last_line(error)}") from error


def disconnect() -> None:
    """Leave the cluster; one that this process has started ends, with all of its processes."""
    global _reaper
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    if _reaper is not None:
        _reaper.end()
        _reaper = None


@contextmanager
def _isolated_sessions() -> Iterator[None]:
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
    os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(here)


def _check_machine() -> None:
    """Refuse to start a cluster where Ray would fail in ways that nobody understands."""
    temporary = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None) or "/tmp"
    if len(os.fsencode(Path(temporary) / _RAY_SOCKET)) > _SOCKET_BYTES:
        raise RequestError(f"the temporary folder {temporary} has too long a path for Ray's sockets; set RAY_TMPDIR=/tmp")
    try:
        with tempfile.TemporaryFile(dir=temporary):
            pass
    except OSError as error:
        raise RequestError(
            f"the temporary folder {temporary} cannot be written ({one_line(error)}); set RAY_TMPDIR to another"
        ) from None
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < _LEAST_OPEN_FILES:
        raise RequestError(f"this process may open just {most} files, and Ray needs more: ulimit -n 8192")
