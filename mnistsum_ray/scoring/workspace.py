"""The folders of a run: where parts are committed, what lies there already, and how the whole is published."""

import ctypes
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from mnistsum_ray.scoring.inputs import FILE_SCHEMA
from mnistsum_ray.scoring.plan import LOCK, MANIFEST, REJECTED, SUMMARIES, UNPUBLISHED
from mnistsum_ray.storage import PARTIAL, Location

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

_LAST: Final = 3
_OLD: Final = ".old"

_MOVES: Final = 16
"""At once: an object store copies and deletes for each."""


@dataclass(frozen=True)
class Listing:
    """What lies in a folder of predictions."""

    predictions: pa.Table
    """`inputs.FILE_SCHEMA`: all but the run's own files and what is hidden."""
    rejected: frozenset[str]
    """Names below `_rejected/`."""
    partial: tuple[str, ...]
    """Names of what was being written when its writer was killed."""


def list_folder(folder: Location) -> Listing:
    """List a folder of predictions; one that is not there is empty."""
    rows, rejected, partial = [], set(), []
    for info in folder.files():
        name = info.path.removeprefix(folder.path).lstrip("/")
        if name.endswith(PARTIAL):
            partial.append(name)
        elif name.startswith(f"{REJECTED}/"):
            rejected.add(name.removeprefix(f"{REJECTED}/"))
        elif not name.startswith(f"{UNPUBLISHED}/") and name not in (*SUMMARIES, MANIFEST, LOCK) and not _is_hidden(name):
            rows.append({"name": name, "size": info.size, "modified": folder.modified(info)})
    return Listing(pa.Table.from_pylist(rows, FILE_SCHEMA), frozenset(rejected), tuple(partial))


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def clean(folder: Location) -> Listing:
    """Delete what a killed run left unfinished, and list what remains. The folder's lock must be held."""
    listing = list_folder(folder)
    for name in listing.partial:
        (folder / name).delete()
    # Rejected rows are written before the predictions, so without those the part is not done and will be written again.
    unfinished = listing.rejected - set(listing.predictions["name"].to_pylist())
    for name in unfinished:
        (folder / REJECTED / name).delete()
    return Listing(listing.predictions, listing.rejected - unfinished, ())


def staging_of(output: Location) -> Location:
    """Where a run commits that must not be seen before it is whole. The output's lock must be held."""
    parent = Path(output.path).parent
    if output.is_local and os.access(parent, os.W_OK) and Path(output.path).stat().st_dev == parent.stat().st_dev:
        folder, _, name = output.path.rpartition("/")
        shutil.rmtree(f"{folder}/.{name}.{UNPUBLISHED.lstrip('_')}{_OLD}", ignore_errors=True)  # left by a kill while publishing
        return output.at(f"{folder}/.{name}.{UNPUBLISHED.lstrip('_')}")
    return output / UNPUBLISHED


def delete_part(folder: Location, name: str) -> None:
    """Delete a part: its predictions first, since they are what says that it is done."""
    (folder / name).delete()
    (folder / REJECTED / name).delete()


def reopen(output: Location) -> None:
    """Take away what says that the output is finished."""
    (output / MANIFEST).delete()
    for name in SUMMARIES:
        (output / name).delete()


def publish(staging: Location, output: Location, *, replace: bool) -> None:
    """Show what lies in the staging folder: in place of what the output holds, or beside it."""
    if replace and staging.is_local:
        held = Path(output.path, LOCK)
        if held.exists():
            os.link(held, Path(staging.path, LOCK))  # so that the folder is held without a gap
        if _exchange(staging.path, output.path):
            old = f"{staging.path}{_OLD}"
            Path(staging.path).rename(old)  # it must not be taken for a staging folder if this process dies now
            shutil.rmtree(old)
            return
        Path(staging.path, LOCK).unlink(missing_ok=True)
    names = [info.path.removeprefix(staging.path).lstrip("/") for info in staging.files()]
    reopen(output)
    with ThreadPoolExecutor(_MOVES) as pool:
        for order in range(_LAST + 1):
            if order == _LAST and replace:
                keep = {(output / name).path for name in (*names, LOCK)} | {info.path for info in staging.files()}
                extra = [info.path for info in output.files() if info.path not in keep]
                list(pool.map(output.filesystem.delete_file, extra))
            now = [name for name in names if _publishing_order(name) == order]
            list(pool.map(lambda name: _move(staging / name, output / name), now))
    if staging.exists():
        staging.filesystem.delete_dir(staging.path)


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
