"""One run at a time on one folder: a kernel's lock on a disk, a lease in an object store."""

import fcntl
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mnistsum_ray import conditional
from mnistsum_ray.errors import Refusal, RunFailed, one_line
from mnistsum_ray.storage import Location

LOCK: Final = "_lock"

HEARTBEAT_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 12.0
"""A lease that has not been renewed for so long was left by a run that was killed, or that does not run any more."""
RENEW_TIMEOUT_SECONDS: Final = 120.0
"""A storage that does not answer for so long is given up."""

_MOST_LOCK_BYTES: Final = 10_000

_LOOK_SECONDS: Final = 1.0
"""A worker looks so often whether the folder is still its run's."""


@dataclass
class Fence:
    """Goes to the workers of a run: none writes any more when another run has taken the folder."""

    place: Location
    holder: str

    def check(self) -> None:
        """Look, now and then, whether the folder is still held.

        Raises:
            OSError: it is not, or the storage does not answer.
        """
        # The clock goes on while a process is stopped, so the first thing that it does after that is to look.
        now = time.monotonic()
        if now - getattr(self, "_looked", -_LOOK_SECONDS) < _LOOK_SECONDS:
            return
        found = _read(self.place)
        if found is None or found["id"] != self.holder:
            raise OSError(f"{_taken_by(found)}; this run writes nothing more")
        self._looked = now

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "holder": self.holder}


@dataclass
class Hold:
    """A folder that is held."""

    fence: Fence
    check: Callable[[], None]
    """Raises RunFailed once the folder is no longer held."""
    conditional: bool
    """Whether the storage knows conditional writes."""
    lost: threading.Event = field(default_factory=threading.Event)
    """Set once the folder is no longer held."""

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the block runs, KeyboardInterrupt is raised in the main thread if the folder is lost: it may wait for long."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_LOOK_SECONDS):
                if self.lost.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@contextmanager
def hold(folder: Location, flag: str, say: Callable[[str], None]) -> Iterator[Hold]:
    """Hold a folder, which is made where it is not there.

    On a file system a lock of the kernel, which ends with the process however that ends. An object store has none: there a
    small object is renewed every two seconds, by conditional writes, so that of two runs one knows that it has lost.

    Args:
        folder: to be held.
        flag: that names it, for messages.
        say: takes a line for the console.

    Raises:
        Refusal: another run holds it, or nothing can be written there.
    """
    holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    fence = Fence((folder / LOCK).patient(), holder)
    if folder.is_local:
        with _file_lock(folder, flag, holder):
            yield Hold(fence, lambda: None, conditional=False)
    else:
        with _Lease(folder, flag, holder, say) as lease:
            yield Hold(fence, lease.check, lease.conditional, lease.lost)


def refuse_held(folder: Location, flag: str) -> None:
    """Refuse a folder on a disk that another run holds at this moment; nothing is made or changed."""
    path = Path(folder.path, LOCK)
    if not folder.is_local or not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(folder, flag, _read(folder / LOCK)) from None


def _taken(folder: Location, flag: str, found: dict[str, Any] | None) -> Refusal:
    holder = f" ({found['id']})" if found else ""
    return Refusal(f"{flag} {folder.text}: another run{holder} is writing there; wait for it, or choose another")


def _taken_by(found: dict[str, Any] | None) -> str:
    return f"another run has taken the output ({found['id'] if found else 'its lock is gone'})"


def _read(place: Location) -> dict[str, Any] | None:
    try:
        found = place.read_json()
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "id" not in found:
        raise OSError(f"{place.text} is not a lock")
    return found


@contextmanager
def _file_lock(folder: Location, flag: str, holder: str) -> Iterator[None]:
    path = Path(folder.path, LOCK)
    made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    written = json.dumps({"id": holder}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        if not _is_lock(os.pread(file, _MOST_LOCK_BYTES, 0)):
            os.close(file)
            raise Refusal(f"{flag} {folder.text}: {LOCK} is not a file of this program; move it away, or choose another folder")
        # In this order, and at once, since workers on other nodes may see the folder through a network file system.
        os.pwrite(file, written, 0)
        os.ftruncate(file, len(written))
        os.fsync(file)
    except BlockingIOError:
        raise _taken(folder, flag, None) from None
    except OSError as error:
        raise Refusal(f"{flag} {folder.text}: cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                path.unlink()
        os.close(file)
        with suppress(OSError):  # of folders that were made for nothing, none is left
            for parent in made:
                parent.rmdir()


def _is_lock(data: bytes) -> bool:
    """Whether a file may be one that a run has left, perhaps before it wrote anything."""
    try:
        found = json.loads(data or b'{"id": null}')
    except ValueError:
        return False
    return isinstance(found, dict) and "id" in found


def _open_locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
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
    def __init__(self, folder: Location, flag: str, holder: str, say: Callable[[str], None]) -> None:
        self._folder, self._place, self._flag, self._say, self._id = folder, folder / LOCK, flag, say, holder
        self._beats = 0
        self._etag = ""
        self._ended = threading.Event()
        self._lost = ""
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self.conditional = False
        self.lost = threading.Event()

    def __enter__(self) -> "_Lease":
        missing = conditional.why_not(self._place)
        self.conditional = missing is None
        try:
            self._take()
        except conditional.UnsupportedError as error:
            self.conditional, missing = False, one_line(error)
            self._take()
        except OSError as error:
            raise Refusal(f"{self._flag} {self._folder.text}: cannot be written ({one_line(error)})") from None
        if missing:
            self._say(
                f"{self._folder.text}: no conditional writes ({missing}), so two runs that meet here may not know of each other; "
                "start just one"
            )
        self._thread.start()
        return self

    def _take(self) -> None:
        before = _read(self._place)
        if before is not None and before["id"] == self._id:  # written just now, by a store that took no notice of the condition
            before = None
        started = time.monotonic()
        while before is not None and time.monotonic() - started < LEASE_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 2)
            now = _read(self._place)
            if now is not None and now != before:
                raise _taken(self._folder, self._flag, now)
            before = now
        if before is not None:
            self._say(f"{self._place.text} was left by a run that does not go on ({before['id']}); taking it over")
        self._renewed = time.monotonic()
        if self.conditional:
            try:
                self._write_over(before)
                return
            except conditional.ConflictError:
                ours, now = self._look()
                if not ours:
                    raise _taken(self._folder, self._flag, now) from None
                return
        self._place.write_bytes(self._next())
        time.sleep(HEARTBEAT_SECONDS / 2)  # of two that start at the same moment, the one that wrote last goes on
        now = _read(self._place)
        if now is None or now["id"] != self._id:
            raise _taken(self._folder, self._flag, now)

    def _look(self) -> tuple[bool, dict[str, Any] | None]:
        """Whether the lease that is there is ours, by a write whose answer was lost, and what it says; then go on from it."""
        found = conditional.get(self._place)
        if found is None:
            return False, None
        now: dict[str, Any] = json.loads(found[0])
        if now["id"] != self._id:
            return False, now
        self._etag = found[1]
        return True, now

    def _write_over(self, before: dict[str, Any] | None) -> None:
        """Write the lease, if what was read is still there."""
        if before is None:
            self._etag = conditional.put_if_absent(self._place, self._next())
        else:
            found = conditional.get(self._place)
            if found is None or json.loads(found[0]) != before:
                raise conditional.ConflictError("another was faster")
            self._etag = conditional.put_if_same(self._place, self._next(), found[1])
        with suppress(conditional.ConflictError):
            conditional.put_if_absent(self._place, self._next())
            raise conditional.UnsupportedError("the storage takes no notice of If-None-Match")

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with suppress(OSError):
                now = _read(self._place)
                if now is not None and now["id"] == self._id:
                    self._place.delete()

    def check(self) -> None:
        # Without an answer for so long, nobody knows who holds it: nothing goes on until the storage says.
        while not self._lost and time.monotonic() - self._renewed > LEASE_SECONDS - 2 * HEARTBEAT_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 4)
        if self._lost:
            raise RunFailed(f"{self._place.text}: {self._lost}; this run stops, what it has committed stays")

    def _renew(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            asked = time.monotonic()
            try:
                found = self._renew_once()
            except OSError:  # the storage may be away for a moment
                pass
            except Exception as error:
                self._give_up(f"the lock is damaged ({one_line(error)}), so that another run may have taken the output")
                return
            else:
                if found is not None:
                    self._give_up(found)
                    return
                self._renewed = asked
            if time.monotonic() - self._renewed > RENEW_TIMEOUT_SECONDS:
                self._give_up(f"not renewed for {RENEW_TIMEOUT_SECONDS:.0f} s, so that another run may have taken the output")
                return

    def _give_up(self, why: str) -> None:
        self._lost = why
        self.lost.set()

    def _renew_once(self) -> str | None:
        """Write the next beat; who has taken the folder, if somebody has."""
        if self.conditional:
            try:
                self._etag = conditional.put_if_same(self._place, self._next(), self._etag)
                return None
            except conditional.ConflictError:
                ours, now = self._look()
                return None if ours else _taken_by(now)
        now = _read(self._place)
        if now is None or now["id"] != self._id:
            return _taken_by(now)
        self._place.write_bytes(self._next())
        return None

    def _next(self) -> bytes:
        self._beats += 1
        return json.dumps({"id": self._id, "beat": self._beats}).encode()
