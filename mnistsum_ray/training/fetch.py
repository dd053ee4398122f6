"""Ray Data's side of the rows: read the source into the object store, and turn tasks into rows in the order of the steps.

This module does not import torch: an actor that took a second to import it would delay the first training rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import TaskPoolStrategy

from mnistsum_ray.cluster.tasks import ray_data_options
from mnistsum_ray.data.distortion import AFFINE_VALUES, distortions
from mnistsum_ray.data.images import PIXELS, SIDE, Pixels, ReasonCounts, one_chunk, pixels_array, pixels_view
from mnistsum_ray.data.order import RowIds, Shuffle, random_numbers
from mnistsum_ray.data.sources import ImageArrays, ParquetFiles, Source
from mnistsum_ray.errors import RequestError, RowCountError, RunError

ROW_BYTES: Final = PIXELS + 60
"""Memory of a row in a block: pixels, digit, number, ids and distortion."""

MAX_RETRIES: Final = 3
"""Processes that Ray starts again for the same rows: by itself Ray Data would start new ones for ever."""

TASK_CPUS: Final = 0
"""Tasks reserve no CPU, so busy workers cannot deadlock them, even when a node is lost and the others are full."""

_BLOCK_ROWS: Final = 8192
"""Rows of a block in the object store, except where a Parquet row group has more or the rows end."""

_CHECKED_ROWS: Final = 65_536
"""Rows that a task looks at whose images are not kept. It reads up to two row groups that it needs only some rows of."""

Columns = dict[str, np.ndarray]

RowData = ImageArrays | ParquetFiles
"""Arrays in the object store, or files: workers fetch rows from them with the method `fetch`."""


@dataclass(frozen=True)
class LoadedRows:
    """A source as the workers reach it."""

    source: Source
    """Without the rows that were found to be bad."""
    data: "ray.ObjectRef[RowData]"
    sha256: str
    """`Source.fingerprint` of both."""


def load_rows(
    source: Source, *, streamed: bool, skip_bad_rows: bool = False, on_progress: Callable[[int], None] = lambda _: None
) -> LoadedRows:
    """Give the workers access to a source: to the files of rows that are streamed; else to decoded rows in the object store.

    Each node copies them from that of the driver, and this process holds them a second time until they are there. With
    `skip_bad_rows` streamed rows are read too, to find the bad ones, and not kept. `on_progress` gets numbers of rows that have
    been read.

    Raises:
        RequestError: a file or a row cannot be used, or too few rows can; the message counts bad rows, and names the first.
        RunError: the storage does not give a file, or the process that reads it dies again and again.
        RowCountError: the files hold more or fewer rows than their footers say.
    """
    data = source.data
    if isinstance(data, ImageArrays) or (streamed and not skip_bad_rows):
        return LoadedRows(source, ray.put(data), source.fingerprint(data))
    kept = 0 if streamed else source.rows
    images, digits = np.empty((kept, SIDE, SIDE), np.uint8), np.empty(kept, np.int8)
    end = 0
    bad_ids, bad = [np.empty(0, np.int64)], ReasonCounts()
    for block in _read_blocks(data, with_images=not streamed):
        first, end = end, end + len(block)
        if end > source.rows:
            break
        if not streamed:
            images[first:end], digits[first:end] = _images_and_digits(block)
        if block["reason"].null_count < len(block):
            reasons = {first + row: reason for row, reason in enumerate(block["reason"].to_pylist()) if reason}
            bad_ids.append(np.array([*reasons], np.int64))
            bad.add_reasons(data.count_bad(reasons))
        on_progress(len(block))
    if end != source.rows:
        raise RowCountError(f"read {end:,} rows of {data.root.display}, whose files hold {source.rows:,}")
    good = source.without(np.concatenate(bad_ids), bad, skip=skip_bad_rows)
    loaded = data if streamed else ImageArrays(images, digits)
    return LoadedRows(good, ray.put(loaded), good.fingerprint(loaded))


def _read_blocks(files: ParquetFiles, *, with_images: bool) -> Iterator[pa.Table]:
    """All rows in the order of their ids, read and decoded on the cluster, as `_read_block` returns them.

    With images they are whole row groups, about _BLOCK_ROWS rows together. Without, no task has the memory for a large group.
    """
    bounds = files.group_bounds
    edges = np.arange(0, bounds[-1], _BLOCK_ROWS if with_images else _CHECKED_ROWS)
    if with_images:
        edges = np.unique(bounds[np.searchsorted(bounds, edges, side="right") - 1])
    items = [{"first": first, "end": end} for first, end in pairwise([*edges.tolist(), int(bounds[-1])])]
    with ray_data_options(preserve_order=True):
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read_block,
            fn_args=(ray.put(files), with_images),
            batch_size=1,
            num_cpus=TASK_CPUS,
            compute=TaskPoolStrategy(size=max(1, min(len(items), int(ray.cluster_resources().get("CPU", 1))))),
            max_retries=MAX_RETRIES,
        )
    dataset.set_name("load-rows")
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        if "error" in block.column_names:
            error, of_type = block["error"][0].as_py(), block["type"][0].as_py()
            raise RequestError(error) if of_type == "RequestError" else RunError(f"--data {error}; nothing was begun")
        yield block


def _read_block(item: Columns, files: ParquetFiles, with_images: bool) -> pa.Table:
    """Rows of a range of ids: `reason` of each bad row, else null; and with images the block."""
    data, ids = _resolved(files), np.arange(item["first"][0], item["end"][0])

    def read() -> pa.Table:
        images, digits, bad = data.decode(ids)
        reasons = pa.array(map(bad.get, ids.tolist()), pa.string()) if bad else pa.nulls(len(ids), pa.string())
        return _block(images, digits, reason=reasons) if with_images else pa.table({"reason": reasons})

    return _or_error(read)


def _or_error(read: Callable[[], pa.Table]) -> pa.Table:
    """The block, or the error as a block: Ray Data would wrap an exception, and its type would be lost."""
    try:
        return read()
    except (RequestError, RunError, OSError) as error:
        kind = "OSError" if isinstance(error, OSError) else type(error).__name__
        return pa.table({"error": [str(error)], "type": [kind]})


class ReadRows:
    """Turns tasks into the rows that a worker trains on, in the order of the steps; runs in an actor."""

    def __init__(self, data: "ray.ObjectRef[RowData]", shuffle: Shuffle, distortion: float) -> None:
        self._data = _resolved(data)
        self._shuffle = shuffle
        self._distortion = distortion

    def __call__(self, task: dict[str, np.ndarray]) -> pa.Table:
        """The rows of the positions first..end-1 of a batch at the steps first_step..end_step-1 of an epoch."""
        of = {name: int(values[0]) for name, values in task.items()}
        epoch, index = of["epoch"], of["index"]
        ids = self._shuffle.ids(epoch, range(of["first_step"], of["end_step"]), range(of["first"], of["end"]))
        return _or_error(lambda: self.rows(epoch, ids, index))

    def rows(self, epoch: int, ids: RowIds, index: int) -> pa.Table:
        """Rows of an epoch, and the index of their task.

        A row's number and distortion follow from (seed, epoch, row id), so a task that Ray runs again yields the same rows.
        """
        images, digits = self._data.fetch(ids)
        seed = self._shuffle.seed
        columns = {
            "row_id": ids,
            "number": random_numbers(seed, epoch, ids),
            "index": np.full(len(ids), index),
        }
        if self._distortion:  # the worker distorts the images, on its device
            matrices = distortions(seed, epoch, ids, self._distortion)
            columns["affine"] = pa.FixedSizeListArray.from_arrays(pa.array(matrices.ravel()), AFFINE_VALUES)
        return _block(images, digits, **columns)


def block_columns(table: pa.Table) -> Columns:
    """The columns of a block as arrays, most of them without a copy; integers as int64."""
    images, digits = _images_and_digits(table)
    columns: Columns = {"image": images, "digit": digits.astype(np.int64)}
    for name in ("row_id", "number"):
        columns[name] = table[name].to_numpy().astype(np.int64, copy=False)
    if "affine" in table.column_names:
        columns["affine"] = one_chunk(table["affine"]).flatten().to_numpy().reshape(-1, AFFINE_VALUES)
    return columns


def _block(images: Pixels, digits: npt.NDArray[np.int8], **columns: Any) -> pa.Table:
    """A block of rows. Images are not copied: Ray Data would make its own Arrow type of them, and copy them twice."""
    return pa.table({"image": pixels_array(images), "digit": digits, **columns})


def _images_and_digits(table: pa.Table) -> tuple[Pixels, npt.NDArray[np.int8]]:
    return pixels_view(one_chunk(table["image"])), table["digit"].to_numpy()


def _resolved(value: Any) -> Any:
    """The object of a reference; Ray passes some arguments as references and resolves others."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value
