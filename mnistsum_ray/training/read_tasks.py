"""Functions of Ray Data's tasks and actors for streamed rows: read pieces of Parquet files, decode and permute them.

This module does not import torch: a process that took a second to import it would delay the first training rows.
"""

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.distortion import distortions
from mnistsum_ray.data.pieces import piece_ids, read_pieces
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import random_numbers, row_order
from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location
from mnistsum_ray.training.blocks import affine_column
from mnistsum_ray.training.schedule import Schedule


def task_to_item(task: pa.Table) -> dict[str, bytes]:
    """A task, which is a table of pieces, as an item of a dataset."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, task.schema) as stream:
        stream.write_table(task)
    return {"task": sink.getvalue().to_pybytes()}


def _item_to_task(item: pa.Table) -> pa.Table:
    """The task of an item, which arrives as a table of one row."""
    return pa.ipc.open_stream(item["task"][0].as_buffer()).read_all()


class ReadWindow:
    """Reads windows, in an actor."""

    def __init__(self, root: Location, schedule: Schedule) -> None:
        self._root, self._schedule = root, schedule

    def __call__(self, item: pa.Table) -> pa.Table:
        """The rows of a window that a worker trains on, in their order: `image`, `digit`, `row_id`, `number`, perhaps `affine`.

        A row's number and distortion follow from (seed, epoch, row id), so a task that Ray runs again yields the same rows.
        """
        schedule, task = self._schedule, _item_to_task(item)
        epoch, lane, first, number = (task[name][0].as_py() for name in ("epoch", "lane", "first", "window"))
        ids = piece_ids(task, schedule.rows)
        row_ids = np.concatenate(ids)
        order = row_order(schedule.seed, epoch, row_ids)
        order = order[schedule.lane_rows_taken(lane, first + np.arange(len(order)), epoch)]
        try:
            table = read_pieces(self._root, task, ids, order)
        except (RequestError, OSError) as error:
            return _error(error)
        row_ids = row_ids[order]
        table = table.append_column("row_id", pa.array(row_ids))
        table = table.append_column("window", pa.array(np.full(len(row_ids), number)))
        table = table.append_column("number", pa.array(random_numbers(schedule.seed, epoch, row_ids).astype(np.int8)))
        if schedule.distortion:  # the worker distorts the images, on its device
            matrices = distortions(schedule.seed, epoch, row_ids, schedule.distortion)
            table = table.append_column("affine", affine_column(matrices))
        return table


def read_rows(item: pa.Table, root: Location, rows: RowRanges) -> pa.Table:
    """The rows of a task in the order of their ids: `image`, `digit` and `row_id`."""
    task = _item_to_task(item)
    ids = piece_ids(task, rows)
    row_ids = np.concatenate(ids)
    try:
        return read_pieces(root, task, ids, np.arange(len(row_ids))).append_column("row_id", pa.array(row_ids))
    except (RequestError, OSError) as error:
        return _error(error)


def _error(error: RequestError | OSError) -> pa.Table:
    """A block that says why there are no rows: an exception would be wrapped by Ray Data, and its type lost."""
    return pa.table({"error": [str(error)], "may_pass": [isinstance(error, OSError)]})
