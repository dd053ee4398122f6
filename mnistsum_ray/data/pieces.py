"""Pieces: row groups of Parquet files with the rows that are wanted of each; planned by the driver or a worker, read by tasks."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.data.decoding import decode_images
from mnistsum_ray.data.parquet import UnusableFileError, check_unchanged, open_parquet
from mnistsum_ray.data.parquet_files import ParquetFiles
from mnistsum_ray.data.parquet_types import plain_table
from mnistsum_ray.data.parts import check_digits, image_table
from mnistsum_ray.data.pixels import SIDE, Pixels, one_chunk
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location

PIECE_SCHEMA: Final = pa.schema(
    {
        "name": pa.string(),  # of the file, as in `parquet_files.FILE_SCHEMA`
        "size": pa.int64(),
        "modified": pa.int64(),
        "digit_column": pa.string(),
        "group": pa.int64(),  # index of the row group in the file
        "group_row": pa.int64(),  # index in the file of the group's first row
        "group_id": pa.int64(),  # row id of the group's first row
        "first_id": pa.int64(),  # the wanted rows are those of a set of rows that are in first_id..end_id-1
        "end_id": pa.int64(),
    }
)

_BATCH_ROWS: Final = 8192
"""Rows that are decompressed at once where only a slice of a row group is wanted."""


def make_pieces(files: ParquetFiles, groups: npt.NDArray[np.int64], first_ids: RowIds, end_ids: RowIds) -> pa.Table:
    """PIECE_SCHEMA of the groups with these indices; arrays int64[n]."""
    all_groups = files.groups
    file = all_groups.file[groups]
    group_ids = all_groups.bounds[groups]
    rows = files.table.select(["name", "size", "modified", "digit_column"]).take(pa.array(file))
    columns = (all_groups.index[groups], group_ids - files.first_ids[file], group_ids, first_ids, end_ids)
    return pa.Table.from_arrays([*rows.columns, *map(pa.array, columns)], schema=PIECE_SCHEMA)


def piece_ids(pieces: pa.Table, rows: RowRanges) -> list[RowIds]:
    """The wanted row ids of each piece, in ascending order."""
    bounds = zip(pieces["first_id"].to_pylist(), pieces["end_id"].to_pylist(), strict=True)
    return [rows.within(*both).ids() for both in bounds]


def read_pieces(root: Location, pieces: pa.Table, ids: list[RowIds], order: npt.NDArray[np.int64]) -> pa.Table:
    """Read and decode rows of pieces.

    Args:
        root: of the files.
        pieces: PIECE_SCHEMA.
        ids: the wanted rows of each piece, see `piece_ids`.
        order: indices, in all wanted rows of all pieces, of the rows to return, in their order.

    Returns:
        The columns `image` (784 bytes) and `digit` int8.

    Raises:
        RequestError: a file is gone or has changed, or a row is not an image with a digit; names the file and the row.
        StorageError: the storage does not give a file.
    """
    images, digits = np.empty((len(order), SIDE, SIDE), np.uint8), np.empty(len(order), np.int8)
    places = np.full(sum(map(len, ids)), -1, np.int64)
    places[order] = np.arange(len(order))
    start = 0
    for piece, wanted in zip(pieces.to_pylist(), ids, strict=True):
        place = places[start : start + len(wanted)]
        start += len(wanted)
        kept = place >= 0
        if not kept.all():
            wanted, place = wanted[kept], place[kept]
        if len(wanted):
            images[place], digits[place] = _read_piece(root, piece, wanted)
    return image_table(images, digits)


def _read_piece(root: Location, piece: dict[str, Any], ids: RowIds) -> tuple[Pixels, npt.NDArray[np.int8]]:
    file = root / piece["name"] if piece["name"] else root
    try:
        check_unchanged(file, piece["size"], piece["modified"])
        table = plain_table(_read_rows(file, piece, ids - piece["group_id"]))
    except UnusableFileError as error:
        raise RequestError(f"{file.display}: {error}") from None
    rows_in_file = piece["group_row"] + ids - piece["group_id"]
    images, bad = decode_images(one_chunk(table["image"]))
    for index, reason in sorted(bad.items()):
        raise RequestError(f"{file.display}: row {rows_in_file[index]}: {reason}")
    return images, check_digits(one_chunk(table[piece["digit_column"]]), file.display, rows_in_file)


def _read_rows(file: Location, piece: dict[str, Any], indices: npt.NDArray[np.int64]) -> pa.Table:
    """Rows of a row group with these indices in it, in ascending order. Rows between them are not kept in memory."""
    columns = ["image", piece["digit_column"]]
    with open_parquet(file) as parquet:
        group = piece["group"]
        if len(indices) == parquet.metadata.row_group(group).num_rows:
            return parquet.read_row_group(group, columns=columns, use_threads=False)
        batches, position = [], 0
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            low, high = np.searchsorted(indices, [position, position + batch.num_rows])
            if high - low == batch.num_rows:
                batches.append(batch)
            elif low < high:
                batches.append(batch.take(pa.array(indices[low:high] - position)))
            position += batch.num_rows
            if high == len(indices):
                break
    if sum(batch.num_rows for batch in batches) != len(indices):
        raise UnusableFileError("has fewer rows in a row group than its footer says")
    return pa.Table.from_batches(batches)
