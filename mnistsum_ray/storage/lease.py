"""TODO storage.lease"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from mnistsum_ray.errors import RequestError, RunError, one_line
from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME, locked_error, read_lock, taken_over_by

HEARTBEAT_SECONDS: Final = 2.0
LEASE_TTL_SECONDS: Final = 12.0
"""A lease that has not been renewed for so long was left by a run that was killed, or that does not run any more."""
RENEW_TIMEOUT_SECONDS: Final = 120.0
"""A storage that does not answer for so long is given up."""


class Lease:
    def __init__(self, folder: Location, flag: str, holder: str, say: Callable[[str], None]) -> None:
        self._folder, self._place, self._flag, self._say, self._id = folder, folder / LOCK_NAME, flag, say, holder
        self._beats = 0
        self._etag = ""
        self._ended = threading.Event()
        self._lost = ""
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self.conditional = False
        self.lost = threading.Event()

    def __enter__(self) -> "Lease":
        missing = conditional.why_not(self._place)
        self.conditional = missing is None
        try:
            self._take()
        except conditional.UnsupportedError as error:
            self.conditional, missing = False, one_line(error)
            self._take()
        except OSError as error:
            raise RequestError(f"{self._flag} {self._folder.display}: cannot be written ({one_line(error)})") from None
        if missing:
            self._say(
                f"{self._folder.display}: no conditional writes ({missing}), so two runs that meet here may not know of each other; "
                "start just one"
            )
        self._thread.start()
        return self

    def _take(self) -> None:
        before = read_lock(self._place)
        if before is not None and before["id"] == self._id:  # written just now, by a store that took no notice of the condition
            before = None
        started = time.monotonic()
        while before is not None and time.monotonic() - started < LEASE_TTL_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 2)
            now = read_lock(self._place)
            if now is not None and now != before:
                raise locked_error(self._folder, self._flag, now)
            before = now
        if before is not None:
            self._say(f"{self._place.display} was left by a run that does not go on ({before['id']}); taking it over")
        self._renewed = time.monotonic()
        if self.conditional:
            try:
                self._write_over(before)
                return
            except conditional.ConflictError:
                ours, now = self._look()
                if not ours:
                    raise locked_error(self._folder, self._flag, now) from None
                return
        self._place.write_bytes(self._next())
        time.sleep(HEARTBEAT_SECONDS / 2)  # of two that start at the same moment, the one that wrote last goes on
        now = read_lock(self._place)
        if now is None or now["id"] != self._id:
            raise locked_error(self._folder, self._flag, now)

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
                now = read_lock(self._place)
                if now is not None and now["id"] == self._id:
                    self._place.delete()

    def check(self) -> None:
        # Without an answer for so long, nobody knows who holds it: nothing goes on until the storage says.
        while not self._lost and time.monotonic() - self._renewed > LEASE_TTL_SECONDS - 2 * HEARTBEAT_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 4)
        if self._lost:
            raise RunError(f"{self._place.display}: {self._lost}; this run stops, what it has committed stays")

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
                return None if ours else taken_over_by(now)
        now = read_lock(self._place)
        if now is None or now["id"] != self._id:
            return taken_over_by(now)
        self._place.write_bytes(self._next())
        return None

    def _next(self) -> bytes:
        self._beats += 1
        return json.dumps({"id": self._id, "beat": self._beats}).encode()
