"""The output folder and its staging folder: what lies there, what is unfinished, and how staged files are published.

OUTPUT/predictions/, OUTPUT/rejected/      files of parts, complete under their names; data alone, so that every reader of
                                           Parquet can take the folder
OUTPUT/files.parquet, *.png, report.html   about the whole run, written after all predictions
OUTPUT/manifest.json                       written last: while it exists, the output is finished
OUTPUT/_unpublished/                       the same, of a run with --overwrite or --strict that has not been published
OUTPUT/_lock                               names the run that writes here
"""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.cluster.map_files import map_files
from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.inputs import FILE_SCHEMA
from mnistsum_ray.errors import RequestError
from mnistsum_ray.reporting.console import Counter, Progress
from mnistsum_ray.scoring.stamp import PREDICTIONS, REJECTED, read_committed
from mnistsum_ray.storage.listing import is_hidden
from mnistsum_ray.storage.location import Location, is_partial
from mnistsum_ray.storage.lock import FolderLock

FILES_TABLE: Final = "files.parquet"
MANIFEST: Final = "manifest.json"
PROBABILITIES: Final = "probabilities.png"
REJECTS: Final = "rejects.png"
RELIABILITY: Final = "reliability.png"
REPORT: Final = "report.html"

SUMMARIES: Final = (FILES_TABLE, PROBABILITIES, REJECTS, RELIABILITY, REPORT)
"""Files about the whole run. They are written after all predictions and before the manifest."""

_STAGING: Final = "_unpublished"

_MOVE_THREADS: Final = 16
"""An object store copies and deletes each file that is moved, so many moves run at the same time."""


@dataclass(frozen=True)
class OutputListing:
    """Files in an output folder or a staging folder."""

    predictions: pa.Table
    """`inputs.FILE_SCHEMA`: files in `predictions/`, named relative to it."""
    rejected: frozenset[str]
    """Names of files in `rejected/`, relative to it."""
    others: tuple[str, ...]
    """Names of files that are neither, nor hidden, nor of the run itself: they are not this program's."""
    partial: tuple[str, ...]
    """Names of files whose writer was killed."""

    @property
    def unfinished_rejects(self) -> frozenset[str]:
        """Names of rejected rows without predictions: a kill came between the two, and the part will be written again."""
        return self.rejected - set(self.predictions["name"].to_pylist())


@dataclass(frozen=True)
class Target:
    """The output folder of a run, and the folder where its parts are committed until they are published."""

    output: Location
    folder: Location
    """Where parts are committed: the output itself, or with `--overwrite` or `--strict` the staging folder inside it."""
    overwrite: bool
    """Whether the staged files replace the files of the output."""
    lock: FolderLock

    @property
    def staged(self) -> bool:
        """Whether `folder` is the staging folder."""
        return self.folder is not self.output

    def merge(self, staged: pa.Table, published: pa.Table) -> pa.Table:
        """Return what the finished output will hold of the staged and the published files (`stamp.COMMITTED_SCHEMA`)."""
        if self.overwrite:
            return staged
        only_published = pc.invert(pc.is_in(published["output"], staged["output"]))
        return pa.concat_tables([staged, published.filter(only_published)])

    def read_committed(self, show: Callable[[Counter], None]) -> pa.Table:
        """Read from the files what the finished output will hold, as `stamp.COMMITTED_SCHEMA`."""
        published = read_stamps(self.output, list_output(self.output).predictions, show)
        if not self.staged:
            return published
        return self.merge(read_stamps(self.folder, list_output(self.folder).predictions, show), published)


def open_target(config: ScoreConfig, output: Location, lock: FolderLock) -> Target:
    """Choose the folder where a run commits its parts.

    Raises:
        RequestError: a file or a link has the staging folder's name.
    """
    if not (config.overwrite or config.strict):
        return Target(output, output, overwrite=False, lock=lock)
    staging = output / _STAGING
    path = Path(staging.path)
    if output.is_local and (path.is_symlink() or (path.exists() and not path.is_dir())):
        # All that is written or deleted through a link would be written or deleted elsewhere.
        raise RequestError(
            f"--output {output.display}: {staging.display} is not a folder of this program, but a link or a file; remove it"
        )
    return Target(output, staging, config.overwrite, lock)


def list_output(folder: Location) -> OutputListing:
    """List an output folder; a folder that does not exist is empty."""
    rows, rejected, others, partial = [], set(), [], []
    for info in folder.files():
        name = info.path.removeprefix(folder.path).lstrip("/")
        if is_partial(name.rpartition("/")[2]) and not name.startswith(f"{_STAGING}/"):
            partial.append(name)
        elif is_hidden(name) or name in (*SUMMARIES, MANIFEST):
            continue
        elif name.startswith(f"{REJECTED}/"):
            rejected.add(name.removeprefix(f"{REJECTED}/"))
        elif name.startswith(f"{PREDICTIONS}/"):
            part = name.removeprefix(f"{PREDICTIONS}/")
            rows.append({"name": part, "size": info.size, "modified": folder.modified(info)})
        else:
            others.append(name)
    return OutputListing(pa.Table.from_pylist(rows, FILE_SCHEMA), frozenset(rejected), tuple(others), tuple(partial))


def read_stamps(folder: Location, predictions: pa.Table, show: Callable[[Counter], None]) -> pa.Table:
    """Read the stamps of all prediction files of a listing, as `stamp.COMMITTED_SCHEMA` in the same order."""
    return map_files(read_committed, folder, predictions, Progress(show, "output files read", predictions.num_rows))


def clear_unfinished(folder: Location, listing: OutputListing) -> None:
    """Delete what a killed run left unfinished. All files must be known as this program's, and the lock must be held."""
    for name in listing.partial:
        (folder / name).delete()
    for name in listing.unfinished_rejects:
        (folder / REJECTED / name).delete()


def delete_part(folder: Location, name: str) -> None:
    """Delete the files of a part. The predictions go first, because a part is done when its predictions exist."""
    (folder / PREDICTIONS / name).delete()
    (folder / REJECTED / name).delete()


def unpublish(output: Location) -> None:
    """Delete the manifest, which marks the output as finished, and then the summaries."""
    (output / MANIFEST).delete()
    for name in SUMMARIES:
        (output / name).delete()


def publish_staged(target: Target, replaced: Collection[str] = ()) -> None:
    """Move all files of the staging folder into the output, in an order that keeps every visible state valid.

    Args:
        target: its lock is checked before each step.
        replaced: with `--overwrite` the names of the predictions that the output held when the run began. Those that are not
            written again are deleted before the manifest appears. All other files stay.

    Raises:
        RunError: another run holds the output.
    """
    staging, output, check = target.folder, target.output, target.lock.check
    names = [info.path.removeprefix(staging.path).lstrip("/") for info in staging.files()]
    gone = {file for name in replaced for file in (f"{PREDICTIONS}/{name}", f"{REJECTED}/{name}")} - set(names)
    check()
    unpublish(output)

    def delete(name: str) -> None:
        check()
        (output / name).delete()

    def move(name: str) -> None:
        check()
        (staging / name).move(output / name)

    # Rejected rows come before predictions, as they are committed.
    parts = {folder: [name for name in names if name.startswith(f"{folder}/")] for folder in (REJECTED, PREDICTIONS)}
    summaries = [name for name in names if name in SUMMARIES]
    steps = ((move, parts[REJECTED]), (move, parts[PREDICTIONS]), (delete, gone), (move, summaries), (move, [MANIFEST]))
    with ThreadPoolExecutor(_MOVE_THREADS) as pool:
        for step, files in steps:
            list(pool.map(step, files))
    check()
    if staging.exists():
        staging.filesystem.delete_dir(staging.path)
