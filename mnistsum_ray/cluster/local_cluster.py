"""A Ray cluster that this process starts on this machine: checks before, and the sessions of its processes."""

import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.cluster import reaper, signals
from mnistsum_ray.cluster.ray_internals import ray_processes_started_by, session_folder
from mnistsum_ray.cluster.reaper import Reaper
from mnistsum_ray.errors import RequestError, one_line

_MIN_OPEN_FILES: Final = 1024
"""Enough for Ray's processes, with some room."""

_MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
_RAY_SOCKET: Final = "ray/session_2026-11-26_09-31-28_741951_1234567/sockets/plasma_store"
"""Ray's longest socket path below the temporary folder."""

_MARK: Final = "mnistsum_ray.pid"
"""File in the session folder of a cluster that this program has started; holds the id of the process."""
_KEPT_SESSIONS: Final = 10

_reaper: Reaper | None = None
"""Reaper of the cluster that this process has started."""
_session: Path | None = None
"""Session folder of that cluster."""


def check_machine() -> None:
    """Raise RequestError if Ray could not start here: it would fail with errors that do not name the cause."""
    temporary = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None) or "/tmp"
    if len(os.fsencode(Path(temporary) / _RAY_SOCKET)) > _MAX_SOCKET_PATH_BYTES:
        raise RequestError(f"the temporary folder {temporary} has too long a path for Ray's sockets; set RAY_TMPDIR=/tmp")
    try:
        with tempfile.TemporaryFile(dir=temporary):
            pass
    except OSError as error:
        raise RequestError(
            f"the temporary folder {temporary} cannot be written ({one_line(error)}); set RAY_TMPDIR to another"
        ) from None
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < _MIN_OPEN_FILES:
        raise RequestError(f"this process may open just {limit} files, and Ray needs more: ulimit -n 8192")


@contextmanager
def ray_processes_in_own_sessions() -> Iterator[None]:
    """Start each process of the cluster in a session of its own while the block runs, and have a reaper end these sessions.

    A closed terminal and `timeout` signal the whole process group. In the driver's group Ray's server would end before the job
    that still needs it. A process in another session would outlive a killed driver: that is what the reaper is for. Where the
    system has no /proc there is no reaper, and the processes stay in the driver's session.
    """
    global _reaper
    if reaper.is_available():
        _reaper = _reaper or Reaper()
    session_reaper = _reaper

    def start(popen: Any, *args: Any, preexec_fn: Any = None, **kwargs: Any) -> Any:
        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)  # the driver blocks them during `ray.init`
            if session_reaper is not None:
                session_reaper.register_from_child()
            if preexec_fn is not None:
                preexec_fn()

        process = popen(*args, preexec_fn=prepare, start_new_session=session_reaper is not None, **kwargs)
        if session_reaper is not None:
            session_reaper.register(process.pid)
        return process

    with ray_processes_started_by(start):
        yield


def mark_session() -> None:
    """Mark the session folder of the cluster that was just started, and delete the oldest of those that have ended.

    Ray keeps the logs of each cluster, a megabyte and more, for ever. Those of jobs that did not end well may be wanted.
    """
    global _session
    _session = Path(session_folder())
    marked = sorted(_session.parent.glob(f"session_*/{_MARK}"), key=lambda mark: mark.stat().st_mtime, reverse=True)
    for mark in marked[_KEPT_SESSIONS:]:
        with suppress(OSError, ValueError):
            if not Path(f"/proc/{int(mark.read_text())}").exists():
                shutil.rmtree(mark.parent, ignore_errors=True)
    (_session / _MARK).write_text(str(os.getpid()))


def end_local_cluster(*, keep_logs: bool) -> None:
    """End the processes that are left of the cluster that this process has started, and delete its session folder."""
    global _reaper, _session
    if _reaper is not None:
        _reaper.end()
        _reaper = None
    if _session is not None and not keep_logs:
        shutil.rmtree(_session, ignore_errors=True)
    _session = None
