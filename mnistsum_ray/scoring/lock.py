"""One run at a time on one output folder."""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from mnistsum_ray.config import Refusal, RunFailed, one_line
from mnistsum_ray.scoring.plan import LOCK
from mnistsum_ray.storage import Location

BEAT_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 12.0
"""A lock in an object store that has not been renewed for so long was left by a run that was killed."""
LOST_SECONDS: Final = 120.0
"""A storage that does not answer for so long is given up."""


@contextmanager
def hold(output: Location, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold an output folder; what is yielded raises RunFailed once the folder is no longer held.

    On a file system a lock of the kernel, which ends with the process however that ends. An object store has none: there a
    small object is renewed every two seconds.

    Raises:
        Refusal: another run holds it, or nothing can be written there.
    """
    place = output / LOCK
    if output.is_local:
        with _file_lock(place):
            yield lambda: None
    else:
        with _Lease(place, say) as lease:
            yield lease.check


def _taken(place: Location, holder: str) -> Refusal:
    output = place.at(place.path.removesuffix(f"/{LOCK}")).text
    return Refusal(f"--output {output}: another run{holder} is writing there; wait for it, or choose another")


@contextmanager
def _file_lock(place: Location) -> Iterator[None]:
    path = Path(place.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except BlockingIOError:
        raise _taken(place, "") from None
    except OSError as error:
        raise Refusal(f"--output {path.parent}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                path.unlink()
        os.close(file)


def _open_locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have deleted it in between: then it is another file that counts.
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


class _Lease:
    def __init__(self, place: Location, say: Callable[[str], None]) -> None:
        self._place, self._say = place, say
        self._id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._beats = 0
        self._ended = threading.Event()
        self._lost = ""
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "_Lease":
        try:
            self._take()
        except (OSError, ValueError) as error:  # the latter where something else lies there under its name
            raise Refusal(f"--output {self._place.text}: cannot be written ({one_line(error)})") from None
        self._thread.start()
        return self

    def _take(self) -> None:
        before = self._read()
        started = time.monotonic()
        while before is not None and time.monotonic() - started < SILENT_SECONDS:
            time.sleep(BEAT_SECONDS / 2)
            now = self._read()
            if now is not None and now != before:
                raise _taken(self._place, f" ({now['id']})")
            before = now
        if before is not None:
            self._say(f"{self._place.text} was left by a run that was killed ({before['id']}); going on")
        self._renewed = time.monotonic()
        self._write()
        time.sleep(BEAT_SECONDS / 2)  # of two that start at the same moment, the one that wrote last goes on
        now = self._read()
        if now is None or now["id"] != self._id:
            raise _taken(self._place, f" ({now['id']})" if now else "")

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with suppress(OSError, ValueError):
                now = self._read()
                if now is not None and now["id"] == self._id:
                    self._place.delete()

    def check(self) -> None:
        # Without an answer for so long, nobody knows who holds it: nothing goes on until the storage says.
        while not self._lost and time.monotonic() - self._renewed > SILENT_SECONDS - 2 * BEAT_SECONDS:
            time.sleep(BEAT_SECONDS / 4)
        if self._lost:
            raise RunFailed(f"{self._place.text}: {self._lost}; this run stops, what it has committed stays")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError, ValueError):  # the storage may be away for a moment
                now = self._read()
                if now is None or now["id"] != self._id:
                    self._lost = f"another run has taken the output ({now['id'] if now else 'its lock is gone'})"
                    return
                asked = time.monotonic()
                self._write()
                self._renewed = asked
            if time.monotonic() - self._renewed > LOST_SECONDS:
                self._lost = f"could not be renewed for {LOST_SECONDS:.0f} s, so that another run may have taken the output"
                return

    def _write(self) -> None:
        self._beats += 1
        self._place.write_bytes(json.dumps({"id": self._id, "beat": self._beats}).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            found = self._place.read_json()
        except FileNotFoundError:
            return None
        if not isinstance(found, dict) or "id" not in found:
            raise ValueError(f"{self._place.text} is not a lock")
        return found
