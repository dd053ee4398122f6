"""Staging folder: where parts are committed that nobody may see before the run is complete, and how they are published."""

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from mnistsum_ray.errors import RequestError
from mnistsum_ray.scoring.layout import MANIFEST, MAX_NAME_BYTES, PREDICTIONS, REJECTED, SUMMARIES, UNPUBLISHED
from mnistsum_ray.scoring.output_folder import unpublish
from mnistsum_ray.scoring.swap_folders import OLD_SUFFIX, exchange_folders, remove_replaced
from mnistsum_ray.storage.location import Location

_MOVE_THREADS: Final = 16
"""An object store copies and deletes each file that is moved, so many moves run at the same time."""

_LAST_STAGE: Final = 3


def staging_folder(output: Location) -> Location:
    """Return the staging folder of an output: beside it if the two can be exchanged, else inside it.

    A replaced output that a killed run has left beside it is deleted. The output's lock must be held.

    Raises:
        RequestError: a file or a link has the staging folder's name.
    """
    parent, _, name = output.path.rpartition("/")
    hidden = f".{name}.{UNPUBLISHED.lstrip('_')}"
    fits = len(f"{hidden}{OLD_SUFFIX}".encode()) <= MAX_NAME_BYTES
    # Only folders on one file system can be exchanged.
    if fits and output.is_local and os.access(parent or "/", os.W_OK) and _device(output.path) == _device(parent or "/"):
        staging, old = output.at(f"{parent}/{hidden}"), output.at(f"{parent}/{hidden}{OLD_SUFFIX}")
        for place in (staging, old):
            _check_is_folder(place, output)
        if old.exists():  # A run was killed between the exchange and the deletion of the old output.
            remove_replaced(old, output, None)
        return staging
    inside = output / UNPUBLISHED
    if output.is_local:
        _check_is_folder(inside, output)
    return inside


def _device(path: str) -> int:
    return Path(path).stat().st_dev


def _check_is_folder(place: Location, output: Location) -> None:
    """Refuse a link: everything written or deleted through it would be written or deleted elsewhere."""
    path = Path(place.path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RequestError(
            f"--output {output.display}: {place.display} is not a folder of this program, but a link or a file; remove it"
        )


def publish_staged(
    staging: Location, output: Location, check: Callable[[], None], *, replace: bool, replaced: Collection[str] = ()
) -> None:
    """Publish the files of the staging folder: with `replace` in place of the output's files, otherwise beside them.

    Args:
        staging: what `staging_folder` returned.
        output: the output folder.
        check: raises once another run holds the output; called before each step.
        replace: whether the output's predictions are deleted.
        replaced: names of the predictions that the output held when the run began. All other files stay.
    """
    if replace and staging.is_local and exchange_folders(staging, output, check):
        old = f"{staging.path}{OLD_SUFFIX}"
        # Under its own name, a later run would take the old output for staged parts if this process died now.
        Path(staging.path).rename(old)
        remove_replaced(output.at(old), output, replaced)
        return
    _move_files(staging, output, check, replaced if replace else ())
    check()
    if staging.exists():
        staging.filesystem.delete_dir(staging.path)


def _move_files(staging: Location, output: Location, check: Callable[[], None], replaced: Collection[str]) -> None:
    """Move all files, in the order that keeps every visible state valid, and delete the replaced files before the manifest."""
    names = [info.path.removeprefix(staging.path).lstrip("/") for info in staging.files()]
    check()
    unpublish(output)

    def delete(name: str) -> None:
        check()
        (output / name).delete()

    def move(name: str) -> None:
        check()
        source, target = staging / name, output / name
        if target.is_local:
            Path(target.path).parent.mkdir(parents=True, exist_ok=True)
        target.filesystem.move(source.path, target.path)

    with ThreadPoolExecutor(_MOVE_THREADS) as pool:
        for stage in range(_LAST_STAGE + 1):
            if stage == _LAST_STAGE:
                gone = {file for name in replaced for file in (f"{PREDICTIONS}/{name}", f"{REJECTED}/{name}")} - set(names)
                list(pool.map(delete, gone))
            list(pool.map(move, [name for name in names if _stage(name) == stage]))


def _stage(name: str) -> int:
    """Rejected rows are published before predictions, as they are committed; the manifest, which marks the end, comes last."""
    return _LAST_STAGE if name == MANIFEST else 2 if name in SUMMARIES else 0 if name.startswith(f"{REJECTED}/") else 1
