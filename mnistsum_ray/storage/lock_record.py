"""The record of a lock: JSON with the id of the run that holds, or last held, a folder."""

import json
from typing import Any, Final

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

LOCK_NAME: Final = "_lock"


def read_lock(place: Location) -> dict[str, Any] | None:
    """The record of a lock file, with the key `id`. None where the file is missing.

    Raises:
        OSError: the file cannot be read, or is not a lock.
    """
    try:
        record = place.read_json()
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "id" not in record:
        raise OSError(f"{place.display} is not a lock")
    return record


def is_lock(data: bytes) -> bool:
    """True for a record, and for an empty file: a run may have been killed before it wrote its record."""
    try:
        record = json.loads(data or b'{"id": null}')
    except ValueError:
        return False
    return isinstance(record, dict) and "id" in record


def locked_error(folder: Location, flag: str, record: dict[str, Any] | None) -> RequestError:
    """Error for a folder that another run holds; the message names that run where its record is known."""
    holder = f" ({record['id']})" if record else ""
    return RequestError(f"{flag} {folder.display}: another run{holder} is writing there; wait for it, or choose another")


def taken_over_message(record: dict[str, Any] | None) -> str:
    """Message for a run whose lock now has the record of another run, or no record."""
    return f"another run has taken the output ({record['id'] if record else 'its lock is gone'})"
