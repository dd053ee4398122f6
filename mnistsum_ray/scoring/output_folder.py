"""Files in an output folder: list them, and delete what is unfinished."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from mnistsum_ray.reporting.progress import Counter, Progress
from mnistsum_ray.scoring.inputs import FILE_SCHEMA
from mnistsum_ray.scoring.layout import MANIFEST, OWN_FILES, PREDICTIONS, REJECTED, SUMMARIES, UNPUBLISHED
from mnistsum_ray.scoring.parallel import map_files
from mnistsum_ray.scoring.provenance import read_committed
from mnistsum_ray.storage.location import Location, is_partial


@dataclass(frozen=True)
class OutputListing:
    """Files in an output folder or a staging folder."""

    predictions: pa.Table
    """`inputs.FILE_SCHEMA`: files in `predictions/`, named relative to it, but for hidden ones."""
    rejected: frozenset[str]
    """Names of files in `rejected/`, relative to it."""
    others: tuple[str, ...]
    """Names of files that are neither, nor hidden, nor of the run itself: they are not this program's."""
    partial: tuple[str, ...]
    """Names of files whose writer was killed."""


def list_output(folder: Location) -> OutputListing:
    """List an output folder; a folder that does not exist is empty."""
    rows, rejected, others, partial = [], set(), [], []
    for info in folder.files():
        name = info.path.removeprefix(folder.path).lstrip("/")
        if is_partial(name.rpartition("/")[2]):
            partial.append(name)
        elif name.startswith(f"{REJECTED}/"):
            rejected.add(name.removeprefix(f"{REJECTED}/"))
        elif name.startswith(f"{UNPUBLISHED}/") or name in OWN_FILES or _is_hidden(name):
            continue
        elif name.startswith(f"{PREDICTIONS}/"):
            part = name.removeprefix(f"{PREDICTIONS}/")
            rows.append({"name": part, "size": info.size, "modified": folder.modified(info)})
        else:
            others.append(name)
    return OutputListing(pa.Table.from_pylist(rows, FILE_SCHEMA), frozenset(rejected), tuple(others), tuple(partial))


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def read_all_committed(folder: Location, predictions: pa.Table, show: Callable[[Counter], None]) -> pa.Table:
    """Read the provenance of all prediction files of a listing, as `provenance.COMMITTED_SCHEMA` in the same order."""
    return map_files(read_committed, folder, predictions, Progress(show, "output files read", predictions.num_rows))


def unfinished_rejects(listing: OutputListing) -> frozenset[str]:
    """Names of rejected rows without predictions: a kill came between the two, and the part will be written again."""
    return listing.rejected - set(listing.predictions["name"].to_pylist())


def clear_unfinished(folder: Location, listing: OutputListing) -> None:
    """Delete what a killed run left unfinished. All files must be known as this program's, and the lock must be held."""
    for name in listing.partial:
        (folder / name).delete()
    for name in unfinished_rejects(listing):
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
