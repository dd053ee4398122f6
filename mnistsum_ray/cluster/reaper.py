"""Ends what is left of a Ray cluster that a job has started, however the job ends.

A job that is killed takes Ray's main processes with it, but not those that these were just starting: two stay behind. So a small
process waits for the end of the job, and then ends all sessions that the job has named. Linux only, since it reads /proc; it is
a script of its own, without imports that take time:

    python -I -S reaper.py      with the job's pipe as standard input
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
"""For what ends by itself, as nearly all of it does."""

_STATE, _SESSION, _START = 0, 3, 19
"""Fields of /proc/PID/stat after the name, which may hold anything."""


class Reaper:
    """The process that waits, and the sessions to be ended; `end` has them end now."""

    def __init__(self) -> None:
        self._sessions: list[tuple[int, str]] = []
        # Its own session: what ends this one, such as Ctrl-C or a closed terminal, must not end it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def tell_from_child(self) -> None:
        """Name the session that the calling process leads: after fork and before exec, so that no kill comes between."""
        assert self._process.stdin is not None
        before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # should the reaper be gone, the cluster must start all the same
        with suppress(OSError):
            os.write(self._process.stdin.fileno(), _line(os.getpid()))
        signal.signal(signal.SIGPIPE, before)

    def tell(self, leader: int) -> None:
        """The same for `end`, in the job."""
        self._sessions += _parse(_line(leader))

    def end(self) -> None:
        """End what is left now; nothing has to wait for that where nothing is left."""
        _end_all(self._sessions)
        self._process.kill()
        self._process.wait()


def is_available() -> bool:
    """Whether this system has what it needs; on others Ray ends its processes by their group."""
    return Path("/proc/self/stat").exists()


def _line(leader: int) -> bytes:
    """Its start tells it from a later process with the same number."""
    stat = _stat(leader)
    return f"{leader} {stat[_START]}\n".encode() if stat else b""


def _parse(lines: bytes) -> list[tuple[int, str]]:
    return [(int(line.split()[0]), line.split()[1].decode()) for line in lines.splitlines()]


def _stat(process: int | str) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:  # it has ended
        return []


def _living(sessions: list[tuple[int, str]]) -> list[int]:
    """The living processes of these sessions. A number is not given again before the last process of its session has ended."""
    ours = {leader for leader, start in sessions if not (stat := _stat(leader)) or stat[_START] == start}
    stats = {int(entry.name): _stat(entry.name) for entry in Path("/proc").glob("[0-9]*")}
    return [process for process, stat in stats.items() if stat and int(stat[_SESSION]) in ours and stat[_STATE] != "Z"]


def _end_all(sessions: list[tuple[int, str]]) -> None:
    began = time.monotonic()
    while processes := _living(sessions):
        for process in processes if time.monotonic() - began >= _GRACE_SECONDS else []:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    _end_all(_parse(sys.stdin.buffer.read()))  # until the job, which holds the other end, has ended
