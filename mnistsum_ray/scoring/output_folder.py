"""TODO scoring.output_folder"""

from dataclasses import dataclass

import pyarrow as pa

from mnistsum_ray.scoring.inputs import FILE_SCHEMA
from mnistsum_ray.scoring.layout import MANIFEST, REJECTED, SUMMARIES, UNPUBLISHED
from mnistsum_ray.storage.location import Location, is_partial
from mnistsum_ray.storage.lock_record import LOCK_NAME


@dataclass(frozen=True)
class OutputListing:
    """What lies in a folder of predictions."""

    predictions: pa.Table
    """`inputs.FILE_SCHEMA`: all but the run's own files and what is hidden."""
    rejected: frozenset[str]
    """Names below `_rejected/`."""
    partial: tuple[str, ...]
    """Names of what was being written when its writer was killed."""


def list_output(folder: Location) -> OutputListing:
    """List a folder of predictions; one that is not there is empty."""
    rows, rejected, partial = [], set(), []
    for info in folder.files():
        name = info.path.removeprefix(folder.path).lstrip("/")
        if is_partial(name.rpartition("/")[2]):
            partial.append(name)
        elif name.startswith(f"{REJECTED}/"):
            rejected.add(name.removeprefix(f"{REJECTED}/"))
        elif not name.startswith(f"{UNPUBLISHED}/") and name not in (*SUMMARIES, MANIFEST, LOCK_NAME) and not _is_hidden(name):
            rows.append({"name": name, "size": info.size, "modified": folder.modified(info)})
    return OutputListing(pa.Table.from_pylist(rows, FILE_SCHEMA), frozenset(rejected), tuple(partial))


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def unfinished_rejects(listing: OutputListing) -> frozenset[str]:
    """Rejected rows without predictions: they are written first, so the part is not done and will be written again."""
    return listing.rejected - set(listing.predictions["name"].to_pylist())


def clear_unfinished(folder: Location, listing: OutputListing) -> None:
    """Delete what a killed run left unfinished. The folder must be known for ours, and its lock be held."""
    for name in listing.partial:
        (folder / name).delete()
    for name in unfinished_rejects(listing):
        (folder / REJECTED / name).delete()


def delete_part(folder: Location, name: str) -> None:
    """Delete a part: its predictions first, since they are what says that it is done."""
    (folder / name).delete()
    (folder / REJECTED / name).delete()


def unpublish(output: Location) -> None:
    """Take away what says that the output is finished."""
    (output / MANIFEST).delete()
    for name in SUMMARIES:
        (output / name).delete()
