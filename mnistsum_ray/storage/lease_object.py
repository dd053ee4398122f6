"""The object with a lease's record, written so that another run's record is never replaced unnoticed.

Where the store has conditional writes, a write replaces only the object that this run wrote or read before. Elsewhere the last
writer wins, and the record is read again after a pause.
"""

import json
import time
from contextlib import suppress
from typing import Any, Final

from mnistsum_ray.storage import conditional
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import read_lock

_SETTLE_SECONDS: Final = 1.0
"""Pause after an unconditional first write: of two runs that start at the same moment, the last writer keeps the lease."""


class LeaseTakenError(Exception):
    """The store holds the record of another run, or no record."""

    def __init__(self, record: dict[str, Any] | None) -> None:
        super().__init__()
        self.record = record


class LeaseObject:
    """The object with a lease's record: taken, renewed and deleted only by the run that wrote it."""

    def __init__(self, place: Location, holder: str) -> None:
        self.place = place
        self.conditional = False
        self._holder = holder
        self._beats = 0
        self._etag = ""

    def is_ours(self, record: dict[str, Any] | None) -> bool:
        """True for a record that this run wrote."""
        return record is not None and record["id"] == self._holder

    def take(self, before: dict[str, Any] | None) -> None:
        """Write this run's first record where the store still holds `before` (None: nothing).

        Raises:
            LeaseTakenError: another run wrote meanwhile.
        """
        if self.conditional:
            try:
                self._replace(before)
            except conditional.ConflictError:
                self._adopt_own_write()
            return
        self.place.write_bytes(self._next_record())
        time.sleep(_SETTLE_SECONDS)
        record = read_lock(self.place)
        if not self.is_ours(record):
            raise LeaseTakenError(record)

    def renew(self) -> None:
        """Write the next record over this run's last one.

        Raises:
            LeaseTakenError: another run has taken the lease.
        """
        if self.conditional:
            try:
                self._etag = conditional.put_if_match(self.place, self._next_record(), self._etag)
            except conditional.ConflictError:
                self._adopt_own_write()
            return
        record = read_lock(self.place)
        if not self.is_ours(record):
            raise LeaseTakenError(record)
        self.place.write_bytes(self._next_record())

    def delete(self) -> None:
        """Delete the object if its record is this run's."""
        if self.is_ours(read_lock(self.place)):
            self.place.delete()

    def _replace(self, before: dict[str, Any] | None) -> None:
        if before is None:
            self._etag = conditional.put_if_absent(self.place, self._next_record())
        else:
            found = conditional.get(self.place)
            if found is None or json.loads(found[0]) != before:
                raise conditional.ConflictError("another run was faster")
            self._etag = conditional.put_if_match(self.place, self._next_record(), found[1])
        # The object exists now, so a store that keeps to the condition refuses this write.
        with suppress(conditional.ConflictError):
            conditional.put_if_absent(self.place, self._next_record())
            raise conditional.UnsupportedError("the storage ignores If-None-Match")

    def _adopt_own_write(self) -> None:
        """After a conflict: go on from this run's own record.

        boto3 repeats a write whose answer was lost, and the repetition conflicts with the first write.
        """
        found = conditional.get(self.place)
        record: dict[str, Any] | None = json.loads(found[0]) if found else None
        if found is None or not self.is_ours(record):
            raise LeaseTakenError(record)
        self._etag = found[1]

    def _next_record(self) -> bytes:
        self._beats += 1
        return json.dumps({"id": self._holder, "beat": self._beats}).encode()
