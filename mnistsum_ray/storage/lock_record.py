"""TODO storage.lock_record"""

import json
from typing import Any, Final

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

LOCK_NAME: Final = "_lock"

MAX_LOCK_BYTES: Final = 10_000


def locked_error(folder: Location, flag: str, found: dict[str, Any] | None) -> RequestError:
    holder = f" ({found['id']})" if found else ""
    return RequestError(f"{flag} {folder.display}: another run{holder} is writing there; wait for it, or choose another")


def taken_over_by(found: dict[str, Any] | None) -> str:
    return f"another run has taken the output ({found['id'] if found else 'its lock is gone'})"


def read_lock(place: Location) -> dict[str, Any] | None:
    try:
        found = place.read_json()
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "id" not in found:
        raise OSError(f"{place.display} is not a lock")
    return found


def is_lock(data: bytes) -> bool:
    """Whether a file may be one that a run has left, perhaps before it wrote anything."""
    try:
        found = json.loads(data or b'{"id": null}')
    except ValueError:
        return False
    return isinstance(found, dict) and "id" in found
