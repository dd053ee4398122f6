"""Reaper process: ends what is left of a Ray cluster that a job has started, however the job ends.

A killed job takes Ray's main processes with it, but not the ones that these were just starting: two stay behind. The reaper waits
for the end of the job, and then ends all sessions that the job has registered. It reads /proc, so it needs Linux. The module is
also the reaper's script, and imports nothing that takes time:

    python -I -S reaper.py      standard input: a pipe from the job with one line `PID START_TIME` for each session
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 2.0
"""Nearly all processes end by themselves in this time; then the others get SIGKILL."""

_STATE, _SESSION, _START_TIME = 0, 3, 19
"""Fields of /proc/PID/stat, counted after the name, which may contain spaces and brackets."""


class Reaper:
    """Starts the reaper process and registers sessions with it. A session is named by the process that leads it."""

    def __init__(self) -> None:
        self._sessions: list[tuple[int, str]] = []
        # In a session of its own: what ends the job's, such as Ctrl-C or a closed terminal, must not end the reaper.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def register_from_child(self) -> None:
        """Register the session of the calling process. Runs after fork and before exec, so that no kill comes between."""
        assert self._process.stdin is not None
        before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # if the reaper has died, the cluster must start nevertheless
        with suppress(OSError):
            os.write(self._process.stdin.fileno(), _line(os.getpid()))
        signal.signal(signal.SIGPIPE, before)

    def register(self, leader: int) -> None:
        """Register a session for `end`. Runs in the job."""
        self._sessions += _parse(_line(leader))

    def end(self) -> None:
        """End the registered sessions and the reaper. Returns at once if no process is left."""
        _end_all(self._sessions)
        self._process.kill()
        self._process.wait()


def is_available() -> bool:
    """Return whether this system has /proc. On others Ray ends its processes by their process group."""
    return Path("/proc/self/stat").exists()


def _line(leader: int) -> bytes:
    """The start time distinguishes the process from a later one with the same id."""
    stat = _stat(leader)
    return f"{leader} {stat[_START_TIME]}\n".encode() if stat else b""


def _parse(lines: bytes) -> list[tuple[int, str]]:
    return [(int(line.split()[0]), line.split()[1].decode()) for line in lines.splitlines()]


def _stat(process: int | str) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:  # the process has ended
        return []


def _living(sessions: list[tuple[int, str]]) -> list[int]:
    """Return the living processes of these sessions. Linux reuses no id before the last process of that session has ended."""
    leaders = {leader for leader, start_time in sessions if not (stat := _stat(leader)) or stat[_START_TIME] == start_time}
    stats = {int(entry.name): _stat(entry.name) for entry in Path("/proc").glob("[0-9]*")}
    return [process for process, stat in stats.items() if stat and int(stat[_SESSION]) in leaders and stat[_STATE] != "Z"]


def _end_all(sessions: list[tuple[int, str]]) -> None:
    started = time.monotonic()
    while processes := _living(sessions):
        for process in processes if time.monotonic() - started >= _GRACE_SECONDS else []:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    _end_all(_parse(sys.stdin.buffer.read()))  # blocks until the job, which holds the other end of the pipe, has ended
