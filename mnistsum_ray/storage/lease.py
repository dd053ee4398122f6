"""A lease on a folder in an object store: a small object that its holder writes again every two seconds."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from mnistsum_ray.errors import RequestError, RunError, one_line
from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.lease_object import LeaseObject, LeaseTakenError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME, locked_error, read_lock, taken_over_message

HEARTBEAT_SECONDS: Final = 2.0
"""Seconds between renewals."""
LEASE_TTL_SECONDS: Final = 12.0
"""Seconds without a renewal after which another run may take the lease: its holder was killed or suspended."""
RENEW_TIMEOUT_SECONDS: Final = 120.0
"""Seconds without an answer of the store after which the run gives up."""


class Lease:
    """Context manager that takes the lease of a folder and renews it in a background thread."""

    def __init__(self, folder: Location, flag: str, holder: str, say: Callable[[str], None]) -> None:
        """Create a lease that is not taken yet.

        Args:
            folder: in an object store.
            flag: names the folder in messages.
            holder: id of this run, for the record.
        """
        self._folder, self._flag, self._say = folder, flag, say
        self._object = LeaseObject(folder / LOCK_NAME, holder)
        self._renewed = 0.0
        self._lost_reason = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewed, daemon=True)

    @property
    def conditional(self) -> bool:
        """Whether the store has conditional writes; known once the lease is taken."""
        return self._object.conditional

    def __enter__(self) -> "Lease":
        unsupported = conditional.unsupported_reason(self._object.place)
        self._object.conditional = unsupported is None
        try:
            self._take()
        except conditional.UnsupportedError as error:
            self._object.conditional, unsupported = False, one_line(error)
            self._take()
        except OSError as error:
            raise RequestError(f"{self._flag} {self._folder.display}: cannot be written ({one_line(error)})") from None
        if unsupported:
            self._say(
                f"{self._folder.display}: the storage has no conditional writes ({unsupported}), so two runs that start in this "
                "folder at the same time may not notice each other; start only one"
            )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost_reason:
            with suppress(OSError):
                self._object.delete()

    def check(self) -> None:
        """Raise RunError if the lease is lost; wait while that is unknown because the store does not answer."""
        while not self._lost_reason and time.monotonic() - self._renewed > LEASE_TTL_SECONDS - 2 * HEARTBEAT_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 4)
        if self._lost_reason:
            raise RunError(f"{self._object.place.display}: {self._lost_reason}; this run stops, what it has committed stays")

    def _take(self) -> None:
        before = self._wait_for_expiry()
        self._renewed = time.monotonic()
        try:
            self._object.take(before)
        except LeaseTakenError as taken:
            raise locked_error(self._folder, self._flag, taken.record) from None

    def _wait_for_expiry(self) -> dict[str, Any] | None:
        """The record of an expired lease, None where there is no lease.

        Raises:
            RequestError: another run renews it.
        """
        place = self._object.place
        before = read_lock(place)
        if self._object.is_ours(before):
            before = None  # this run wrote it just now, to a store that ignored the condition
        started = time.monotonic()
        while before is not None and time.monotonic() - started < LEASE_TTL_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 2)
            record = read_lock(place)
            if record is not None and record != before:
                raise locked_error(self._folder, self._flag, record)
            before = record
        if before is not None:
            self._say(f"{place.display} was left by a run that no longer renews it ({before['id']}); taking it over")
        return before

    def _keep_renewed(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            asked, reason = time.monotonic(), ""
            try:
                self._object.renew()
                self._renewed = asked
            except OSError:  # the store may not answer for a moment
                pass
            except LeaseTakenError as taken:
                reason = taken_over_message(taken.record)
            except Exception as error:
                reason = f"the lock is damaged ({one_line(error)}), so that another run may have taken the output"
            if not reason and time.monotonic() - self._renewed > RENEW_TIMEOUT_SECONDS:
                reason = f"not renewed for {RENEW_TIMEOUT_SECONDS:.0f} s, so that another run may have taken the output"
            if reason:
                self._lost_reason = reason
                return
