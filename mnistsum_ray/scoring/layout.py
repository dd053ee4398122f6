"""File names in an output folder."""

from typing import Final

from mnistsum_ray.storage.lock_file import LOCK_NAME

REJECTED: Final = "_rejected"
"""Folder of the rejected rows; its files have the names of the prediction files."""

FILES_TABLE: Final = "_files.parquet"
MANIFEST: Final = "_manifest.json"
PROBABILITIES: Final = "_probabilities.png"
REJECTS: Final = "_rejects.png"
RELIABILITY: Final = "_reliability.png"

UNPUBLISHED: Final = "_unpublished"
"""Staging folder inside an output folder that has no room for one beside it."""

SUMMARIES: Final = (FILES_TABLE, PROBABILITIES, REJECTS, RELIABILITY)
"""Files about the whole run. They are written after all predictions and before the manifest."""

RESERVED_NAMES: Final = (REJECTED, *SUMMARIES, MANIFEST, LOCK_NAME, UNPUBLISHED)

MAX_NAME_BYTES: Final = 255
"""Longest file name, without its folder, on most file systems."""


def is_reserved(output: str) -> bool:
    """Return whether an output file of this name would collide with the run's own files, or be hidden."""
    name = output.rpartition("/")[2]
    return output.split("/")[0] in RESERVED_NAMES or name.startswith(".")
