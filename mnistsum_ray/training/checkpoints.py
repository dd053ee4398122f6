"""TODO training.checkpoints"""

import re
from collections.abc import Callable
from typing import Final

from pyarrow.fs import FileSelector, FileType

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.state import CheckpointError, CheckpointVersionError, verify_checkpoint

_SNAPSHOT: Final = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints, which it writes in place: a kill in that moment leaves it cut short."""

_CHECKPOINT: Final = re.compile(r"epoch_(\d+)(?:_(step)_(\d+)|_(sum_head))?")


def latest_valid_checkpoint(folder: Location, say: Callable[[str], None]) -> Location | None:
    """The newest whole checkpoint of a run; newer ones that are not are said, and that there is none.

    Raises:
        RequestError: it is of another version.
    """
    found: dict[tuple[int, int, int], str] = {}
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        match = _CHECKPOINT.fullmatch(info.base_name)
        if match and info.type == FileType.Directory:
            epoch = int(match[1])
            # One within an epoch is called after the epoch that it is in, and lies before that epoch's end.
            order = (epoch - 1, 1, int(match[3])) if match[2] else (epoch, 0, int(bool(match[4])))
            found[order] = info.base_name
    for order in sorted(found, reverse=True):
        place = folder / found[order]
        try:
            verify_checkpoint(place)
        except CheckpointVersionError as error:
            raise RequestError(f"--resume: checkpoint {place.display} cannot be used: {error}; go on with that version") from None
        except CheckpointError as error:
            say(f"checkpoint {place.display} cannot be used: {error}")
            continue
        return place
    say(f"no checkpoint {'can be used' if found else 'is left'}, so the run begins anew")
    return None


def delete_other_checkpoints(folder: Location, start: Location | None) -> None:
    """Delete the run's checkpoints but the one that it goes on from, and Ray Train's list of them: it begins a new one."""
    (folder / _SNAPSHOT).delete()
    for info in folder.filesystem.get_file_info(FileSelector(folder.path, allow_not_found=True)):
        if _CHECKPOINT.fullmatch(info.base_name) and (start is None or info.path != start.path):
            folder.filesystem.delete_dir(info.path)
