"""Replace an output folder by a staging folder in one step, and remove the replaced one."""

import ctypes
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from mnistsum_ray.scoring.layout import OWN_FILES, PREDICTIONS, REJECTED
from mnistsum_ray.scoring.output_folder import list_output
from mnistsum_ray.scoring.provenance import has_provenance
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_file import LOCK_NAME

OLD_SUFFIX: Final = ".old"
"""Appended to the name of the staging folder once it holds the replaced output."""

# Of renameat2(2).
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


def exchange_folders(staging: Location, output: Location, check: Callable[[], None]) -> bool:
    """Exchange two local folders in one step. Afterwards `output` holds the staged files and `staging` the old ones.

    Returns:
        False if the system or the file system cannot; then nothing has changed.
    """
    _copy_permissions(output, staging)
    check()
    if _share_lock(staging, output) and _rename_exchange(staging.path, output.path):
        return True
    Path(staging.path, LOCK_NAME).unlink(missing_ok=True)
    return False


def _copy_permissions(output: Location, staging: Location) -> None:
    """Give the folders of the new output the owner, mode and attributes of the old ones."""
    for folder, _, _ in os.walk(output.path):
        counterpart = Path(staging.path, os.path.relpath(folder, output.path))
        if counterpart.is_dir():
            with suppress(OSError):  # the owner is another user, or the file system has no attributes
                status = Path(folder).stat()
                os.chown(counterpart, status.st_uid, status.st_gid)
            with suppress(OSError):
                shutil.copystat(folder, counterpart)


def _share_lock(staging: Location, output: Location) -> bool:
    """Link the lock file into the staging folder, so that the output is locked throughout the exchange.

    Returns:
        False if the file system has no hard links.
    """
    held, shared = Path(output.path, LOCK_NAME), Path(staging.path, LOCK_NAME)
    shared.unlink(missing_ok=True)  # left by a killed run
    if not held.exists():
        return True
    try:
        os.link(held, shared)
    except OSError:  # exFAT and some network file systems
        return False
    return True


def _rename_exchange(first: str, second: str) -> bool:
    """Exchange two folders with renameat2(2); return False if the system cannot."""
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def remove_replaced(old: Location, output: Location, replaced: Collection[str] | None) -> None:
    """Delete a replaced output; files of others in it move to the same place in the new output.

    Args:
        old: the replaced output.
        output: the new output.
        replaced: names of the old predictions; None: every file with provenance is one.
    """
    listing = list_output(old)
    names = {*listing.predictions["name"].to_pylist(), *listing.rejected}
    parts = {f"{part}/{name}" for name in names for part in (PREDICTIONS, REJECTED) if replaced is None or name in replaced}
    if replaced is None:
        parts = {file for file in parts if has_provenance(old, file)}
    deletable = {*parts, *OWN_FILES, *listing.partial}
    for folder, subfolders, files in os.walk(old.path, topdown=False):
        # os.walk lists links to folders among the folders and does not follow them.
        for name in (*files, *(name for name in subfolders if Path(folder, name).is_symlink())):
            path = Path(folder, name)
            relative = str(path.relative_to(old.path))
            if relative in deletable:
                path.unlink()
            else:
                target = Path(output.path, relative)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target.with_name(f"{target.name}{OLD_SUFFIX}") if os.path.lexists(target) else target)
        with suppress(OSError):  # not empty: a file has appeared meanwhile
            Path(folder).rmdir()
