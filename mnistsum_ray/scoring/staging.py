"""The folders of a run: where parts are committed, what lies there already, and how the whole is published."""

import ctypes
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.layout import MANIFEST, MOST_NAME_BYTES, REJECTED, SUMMARIES, UNPUBLISHED
from mnistsum_ray.scoring.output_folder import list_output, unpublish
from mnistsum_ray.scoring.provenance import is_ours
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.lock_record import LOCK_NAME

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

_LAST: Final = 3
_OLD: Final = ".old"

_MOVES: Final = 16
"""At once: an object store copies and deletes for each."""


def staging_folder(output: Location) -> Location:
    """Where a run commits that must not be seen before it is whole. The output's lock must be held.

    Raises:
        RequestError: something lies there that is no folder.
    """
    folder, _, name = output.path.rpartition("/")
    beside = f".{name}.{UNPUBLISHED.lstrip('_')}"
    fits = len(f"{beside}{_OLD}".encode()) <= MOST_NAME_BYTES
    if fits and output.is_local and os.access(folder or "/", os.W_OK) and _device(output.path) == _device(folder or "/"):
        staging, old = output.at(f"{folder}/{beside}"), output.at(f"{folder}/{beside}{_OLD}")
        for place in (staging, old):
            _refuse_planted(place, output)
        if old.exists():  # left by a kill while publishing
            _retire(old, output, None)
        return staging
    inside = output / UNPUBLISHED
    if output.is_local:
        _refuse_planted(inside, output)
    return inside


def _device(path: str) -> int:
    return Path(path).stat().st_dev


def _refuse_planted(place: Location, output: Location) -> None:
    """A link that somebody put there would lead all that is written, and deleted, to another place."""
    path = Path(place.path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RequestError(
            f"--output {output.display}: {place.display} is not a folder of this program, but a link or a file; remove it"
        )


def publish_output(
    staging: Location, output: Location, check: Callable[[], None], *, replace: bool, ours: Collection[str] = ()
) -> None:
    """Show what lies in the staging folder: in place of what the output holds, or beside it.

    Args:
        staging: the folder that `staging_folder` gave.
        output: the folder.
        check: raises once the output is another run's; called before each step.
        replace: whether the predictions that the output holds go.
        ours: their names, as they were known for ours when the run began; what else lies there stays.
    """
    if replace and staging.is_local:
        _take_permissions(staging, output)
        check()
        if _share_lock(staging, output) and _exchange(staging.path, output.path):
            old = f"{staging.path}{_OLD}"
            Path(staging.path).rename(old)  # it must not be taken for a staging folder if this process dies now
            _retire(output.at(old), output, ours)
            return
        Path(staging.path, LOCK_NAME).unlink(missing_ok=True)
    names = [info.path.removeprefix(staging.path).lstrip("/") for info in staging.files()]
    check()
    unpublish(output)

    def delete(name: str) -> None:
        check()
        (output / name).delete()

    def move(name: str) -> None:
        check()
        _move(staging / name, output / name)

    with ThreadPoolExecutor(_MOVES) as pool:
        for order in range(_LAST + 1):
            if order == _LAST and replace:
                gone = {part for name in ours for part in (name, f"{REJECTED}/{name}")} - set(names)
                list(pool.map(delete, gone))
            list(pool.map(move, [name for name in names if _publishing_order(name) == order]))
    check()
    if staging.exists():
        staging.filesystem.delete_dir(staging.path)


def _share_lock(staging: Location, output: Location) -> bool:
    """Have both folders hold the lock, so that the output is held without a gap; False where files have just one name."""
    held, shared = Path(output.path, LOCK_NAME), Path(staging.path, LOCK_NAME)
    shared.unlink(missing_ok=True)  # left by a kill
    if not held.exists():
        return True
    try:
        os.link(held, shared)
    except OSError:  # exFAT, some network file systems
        return False
    return True


def _take_permissions(staging: Location, output: Location) -> None:
    """Give the folders that will be the output the owner, mode and attributes of those that are."""
    for here, _, _ in os.walk(output.path):
        same = Path(staging.path, os.path.relpath(here, output.path))
        if same.is_dir():
            with suppress(OSError):  # of another owner, or a file system without attributes
                status = Path(here).stat()
                os.chown(same, status.st_uid, status.st_gid)
            with suppress(OSError):
                shutil.copystat(here, same)


def _retire(old: Location, output: Location, ours: Collection[str] | None) -> None:
    """Delete a replaced output, but for what is not of this program: that moves to where it was, in the new one.

    `ours` are the names of its predictions; None where just their metadata tell.
    """
    listing = list_output(old)
    names = {*listing.predictions["name"].to_pylist(), *listing.rejected}
    parts = {part for name in names for part in (name, f"{REJECTED}/{name}") if ours is None or name in ours}
    if ours is None:
        parts = {part for part in parts if is_ours(old, part)}
    own = {*parts, *SUMMARIES, MANIFEST, LOCK_NAME, *listing.partial}
    for here, folders, files in os.walk(old.path, topdown=False):
        for name in (*files, *(name for name in folders if Path(here, name).is_symlink())):
            path = Path(here, name)
            relative = str(path.relative_to(old.path))
            if relative in own:
                path.unlink()
            else:
                target = Path(output.path, relative)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target.with_name(f"{target.name}{_OLD}") if os.path.lexists(target) else target)
        with suppress(OSError):
            Path(here).rmdir()


def _publishing_order(name: str) -> int:
    """Rejected rows before predictions, as they are committed; what says that all is there last."""
    return _LAST if name == MANIFEST else 2 if name in SUMMARIES else 0 if name.startswith(f"{REJECTED}/") else 1


def _move(source: Location, target: Location) -> None:
    if target.is_local:
        Path(target.path).parent.mkdir(parents=True, exist_ok=True)
    target.filesystem.move(source.path, target.path)


def _exchange(one: str, other: str) -> bool:
    """Have two folders change places in one step; False where the system cannot."""
    exchange: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is None:
        return False
    return exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
