"""File names in an output folder. Data lie in folders of their own, so that every reader of Parquet can take such a folder."""

from typing import Final

from mnistsum_ray.storage.lock_file import LOCK_NAME

PREDICTIONS: Final = "predictions"
"""Folder of the scored rows."""

REJECTED: Final = "rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

FILES_TABLE: Final = "files.parquet"
MANIFEST: Final = "manifest.json"
PROBABILITIES: Final = "probabilities.png"
REJECTS: Final = "rejects.png"
RELIABILITY: Final = "reliability.png"
REPORT: Final = "report.html"

UNPUBLISHED: Final = "_unpublished"
"""Staging folder inside an output folder that has no room for one beside it."""

SUMMARIES: Final = (FILES_TABLE, PROBABILITIES, REJECTS, RELIABILITY, REPORT)
"""Files about the whole run. They are written after all predictions and before the manifest."""

OWN_FILES: Final = (*SUMMARIES, MANIFEST, LOCK_NAME)
"""Files of this program that are not in a folder of the output."""

MAX_NAME_BYTES: Final = 255
"""Longest file name, without its folder, on most file systems."""


def is_hidden(name: str) -> bool:
    """Return whether readers of Parquet skip a file of this name: they do if it, or a folder of it, begins with `.` or `_`."""
    return any(component.startswith((".", "_")) for component in name.split("/"))
