"""One value of `--input`: a file, a folder, a glob, or a URI of one of these."""

import os
import re

import pyarrow.fs as pafs

from mnistsum_ray.data.parquet import is_data_file
from mnistsum_ray.errors import RequestError, one_line
from mnistsum_ray.storage.globbing import Pattern, list_glob
from mnistsum_ray.storage.listing import Listing, list_file, list_folder, relative_parts
from mnistsum_ray.storage.paths import locate_existing


class InputValue:
    """A value of `--input`, located: the place, and the part of a glob that has wildcards.

    Raises:
        RequestError: nothing is there, or it cannot be accessed.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        """The value as messages show it: a URI without its query, which may hold keys."""
        # In a URI, a question mark begins the query and is no wildcard.
        fixed, self.pattern = _split_glob(text, r"[*\[]" if "://" in text else r"[*?\[]")
        place = locate_existing(text if self.pattern is None else fixed, "--input")
        if self.pattern is not None and "://" not in text and os.path.lexists(text):
            place, self.pattern = locate_existing(text, "--input"), None  # a file whose name contains wildcards
        if place.is_local:
            place = place.at(os.path.realpath(place.path))
        else:
            self.text = "/".join((place.display, *(self.pattern or ())))
        self.place = place
        try:
            self.info = place.info()
        except OSError as error:
            raise RequestError(f"--input {self.text}: {one_line(error)}") from None
        if self.info.type == pafs.FileType.NotFound:
            raise RequestError(f"--input {self.text}: there is no {place.display}")
        if self.pattern is not None and self.is_file:
            raise RequestError(f"--input {self.text}: {place.display} is a file, not a folder")

    @property
    def is_file(self) -> bool:
        return bool(self.info.type == pafs.FileType.File)

    @property
    def folder(self) -> str:
        """Path of the folder that the value names, or that holds the file."""
        path = self.place.path
        return (path.rpartition("/")[0] or "/" * self.place.is_local) if self.is_file else path

    def list(self) -> Listing:
        """List the files that the value names; of a folder, those with a Parquet suffix that are not hidden."""
        if self.is_file:
            return list_file(self.place)
        if self.pattern is not None:
            return list_glob(self.place, self.pattern)
        return list_folder(self.place).filter(lambda path: is_data_file(relative_parts(path, self.place.path) or ("",)))


def _split_glob(text: str, wildcards: str) -> tuple[str, Pattern | None]:
    """Split a glob into its leading folders without wildcards, and the other components; None if it has no wildcards."""
    parts = text.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(wildcards, part)), None)
    if first is None:
        return text, None
    return "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), tuple(part for part in parts[first:] if part)
