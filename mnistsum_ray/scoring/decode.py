"""Decode the rows of a part: images, numbers and labels of the good rows, and a reason for each bad row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.decoding import decode_images, decode_numbers, join_reasons
from mnistsum_ray.data.parquet import UnusableFileError
from mnistsum_ray.data.pixels import SIDE, Pixels, one_chunk
from mnistsum_ray.scoring.input_columns import Columns
from mnistsum_ray.scoring.parts import Part


@dataclass(frozen=True)
class DecodedPart:
    """The rows of one part: n good rows, which can be scored, and the rejected rows."""

    part: Part
    passthrough: pa.Table
    """The good rows with every input column but the image."""
    images: Pixels
    """uint8[n, 28, 28]"""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..9"""
    labels: npt.NDArray[np.int64] | None
    """int64[n], the true digit, -1 where it is unknown; None without a label column."""
    rejected: pa.Table
    """The rejected rows with every input column."""
    reasons: dict[int, str]
    """Why each rejected row cannot be scored, by its index in the part, in ascending order."""

    def without_images(self) -> "DecodedPart":
        """The same part with no images, for the writer, which does not need them."""
        return replace(self, images=self.images[:0])


@dataclass(frozen=True)
class UnreadablePart:
    """A part that cannot be read although the footer of its file could."""

    part: Part
    reason: str


@dataclass(frozen=True)
class BatchRows:
    """The good rows of several parts, one after the other."""

    images: Pixels
    """uint8[n, 28, 28]"""
    numbers: npt.NDArray[np.int64]
    """int64[n], 0..9"""
    labels: npt.NDArray[np.int64] | None
    """int64[n], -1 where unknown; None without a label column."""

    @classmethod
    def of(cls, parts: Sequence[DecodedPart | UnreadablePart]) -> "BatchRows":
        """The rows of the readable parts."""
        decoded = [part for part in parts if isinstance(part, DecodedPart)]
        if not decoded:
            return cls(np.empty((0, SIDE, SIDE), np.uint8), np.empty(0, np.int64), None)
        if len(decoded) == 1:
            return cls(decoded[0].images, decoded[0].numbers, decoded[0].labels)
        labels = [part.labels for part in decoded if part.labels is not None]
        return cls(
            np.concatenate([part.images for part in decoded]),
            np.concatenate([part.numbers for part in decoded]),
            np.concatenate(labels) if labels else None,
        )


def decode_part(part: Part, table: pa.Table, columns: Columns) -> DecodedPart:
    """Decode the rows of a part; `table` has them with every input column.

    Raises:
        UnusableFileError: the file has fewer rows there than its footer says.
    """
    if table.num_rows != part.rows:
        raise UnusableFileError(
            f"has {table.num_rows:,} rows from row {part.first_row:,} on, where its footer says {part.rows:,}"
        )
    images, bad_images = decode_images(one_chunk(table[columns.image]))
    numbers, bad_numbers = decode_numbers(one_chunk(table[columns.number]))
    labels = None
    if columns.label:
        labels, bad_labels = decode_numbers(one_chunk(table[columns.label]))
        labels[list(bad_labels)] = -1
    passthrough = table.drop_columns([columns.image])
    if not bad_images and not bad_numbers:
        return DecodedPart(part, passthrough, images, numbers, labels, table.slice(0, 0), {})
    reasons = join_reasons(bad_images, bad_numbers)
    bad = np.fromiter(reasons, np.int64)
    good = np.setdiff1d(np.arange(part.rows), bad)
    return DecodedPart(
        part,
        passthrough.take(pa.array(good)),
        images[good],
        numbers[good],
        None if labels is None else labels[good],
        table.take(pa.array(bad)),
        reasons,
    )
