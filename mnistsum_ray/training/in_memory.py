"""Rows in memory: read and decoded once into the object store; tasks of Ray Data gather them in the order of each epoch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.cluster.data_context import ray_data_options
from mnistsum_ray.data.parts import ParquetPart
from mnistsum_ray.data.pixels import SIDE
from mnistsum_ray.data.row_ranges import RowRanges
from mnistsum_ray.data.sampling import RowIds, shard_for_rank
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, RowCountError
from mnistsum_ray.training.blocks import columns_of, digits_of, images_of
from mnistsum_ray.training.gather import Gather, GatherChunk, read_source_part
from mnistsum_ray.training.pipeline import Batch, split_into_steps, to_device
from mnistsum_ray.training.schedule import Schedule

TASK_CPUS: Final = 0
"""Tasks reserve no CPU, so busy workers cannot deadlock them, even when a node is lost and the others are full."""

_AHEAD_BYTES: Final = 64 * 2**20
"""Memory of gathered rows that wait for the worker."""

_NO_ROWS: Final[dict[str, np.ndarray]] = {
    "image": np.empty((0, SIDE, SIDE), np.uint8),
    **{name: np.empty(0, np.int64) for name in ("digit", "row_id", "number")},
}


@dataclass(frozen=True)
class MaterializedSource:
    """Rows of a data source in the object store."""

    images: MaterializedDataset
    """Columns `image` (784 bytes) and `digit` int8, in row id order."""
    first_ids: RowIds
    """Row id of the first row of each block."""
    fingerprint: str
    """SHA-256 over all pixels and digits in row id order, and over the row ids of the three splits."""
    lineage: ray.data.Dataset | None
    """The dataset that `images` was computed from. While a reference exists, Ray can compute blocks of a lost node again."""


def materialize_source(source: Source, rows: RowRanges | None = None) -> MaterializedSource:
    """Read and decode on the cluster.

    Args:
        source: the data.
        rows: read only the parts that hold any of these; None reads all.

    Raises:
        RequestError: a file or a row cannot be used; the message names it.
        RowCountError: the files hold more or fewer rows than their footers say.
    """
    with ray_data_options(preserve_order=True):
        lineage, images, planned = _materialize(source, rows)
    digest, counts = hashlib.sha256(), []
    for block in images.to_arrow_refs():
        table: pa.Table = ray.get(block)
        if "error" in table.column_names and table["error"].null_count < table.num_rows:
            raise RequestError(table["error"].drop_null()[0].as_py())
        counts.append(table.num_rows)
        digest.update(np.ascontiguousarray(images_of(table)).data)
        digest.update(np.ascontiguousarray(digits_of(table)).data)
    if sum(counts) != sum(count for _, count in planned):
        raise RowCountError(f"read {sum(counts):,} rows of {source.location}, whose files hold {sum(c for _, c in planned):,}")
    for split in source.splits if rows is None else (rows,):
        ids = split.ids()
        digest.update(f"{len(ids)} rows".encode() + ids.tobytes())
    return MaterializedSource(images, _first_ids(planned, counts), digest.hexdigest(), lineage)


def _materialize(
    source: Source, rows: RowRanges | None
) -> tuple[ray.data.Dataset | None, MaterializedDataset, list[tuple[int, int]]]:
    """The lineage, the images, and of each part the first row id and the number of rows."""
    if source.files is None:
        counts = [table.num_rows for table in source.tables]
        first_ids = np.cumsum(counts) - counts
        images = ray.data.from_arrow(list(source.tables)).materialize()
        return None, images, list(zip(first_ids.tolist(), counts, strict=True))
    parts: tuple[ParquetPart, ...] = tuple(source.files.parts(rows))
    # Parts are named by index: a column of Python objects would need Ray's Arrow type for pickled objects.
    indices = [{"part": index} for index in range(len(parts))]
    lineage = ray.data.from_items(indices, override_num_blocks=len(indices))
    tasks = TaskPoolStrategy(size=min(len(indices), max(1, int(ray.cluster_resources().get("CPU", 1)))))
    images = lineage.map_batches(
        read_source_part, fn_args=(parts,), batch_format="pyarrow", batch_size=1, num_cpus=TASK_CPUS, compute=tasks
    ).materialize()
    return lineage, images, [(part.first_id, part.rows) for part in parts]


def _first_ids(planned: list[tuple[int, int]], counts: list[int]) -> RowIds:
    """Row id of the first row of each block. Ray Data may have cut a part into several blocks; none holds rows of two parts."""
    first_ids, blocks = list[int](), iter(counts)
    for first_id, rows in planned:
        done = 0
        while done < rows:
            first_ids.append(first_id + done)
            done += next(blocks)
        if done != rows:
            raise RowCountError(f"a block of {done:,} rows does not end with its part of {rows:,}")
    return np.array(first_ids, np.int64)


class InMemoryRows:
    """Rows in the object store; see `pipeline.Rows`."""

    def __init__(self, images: MaterializedDataset, first_ids: RowIds) -> None:
        self._images, self._gather = images, Gather(images.to_arrow_refs(), first_ids)

    def lanes(self, rows: RowRanges, batch_size: int) -> int:
        """Number of lanes of a batch: each position of it is one, so any worker may take any rows."""
        return batch_size

    def training_batches(self, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
        """This worker's share of each step of all remaining epochs, in order."""
        batches = to_device(self._training_rows(schedule, actors=2 if device.type == "cuda" else 1), device)
        for chunk, batch in zip(schedule.chunks(), batches, strict=True):
            yield from split_into_steps(batch, schedule, chunk)

    def _training_rows(self, schedule: Schedule, actors: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows of each chunk, in order."""
        tasks = [vars(chunk) for chunk in schedule.chunks() if schedule.chunk_rows(chunk)]
        blocks = self._training_blocks(schedule, tasks, actors) if tasks else iter(())
        for chunk in schedule.chunks():
            rows = schedule.chunk_rows(chunk)
            columns = columns_of(next(blocks)) if rows else _NO_ROWS  # Ray Data yields no empty blocks
            if len(columns["row_id"]) != rows:
                raise RowCountError(f"a block of epoch {chunk.epoch + 1} has {len(columns['row_id'])} rows, not {rows}")
            yield columns

    def _training_blocks(self, schedule: Schedule, tasks: list[dict[str, int]], actors: int) -> Iterator[pa.Table]:
        with ray_data_options(preserve_order=True, object_store_bytes=_AHEAD_BYTES):
            dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                GatherChunk,
                fn_constructor_args=(self._gather, schedule),
                batch_size=1,
                num_cpus=TASK_CPUS,
                # Actors, since Ray ends the process of a task that has had nothing to do for a second, and a new one takes two
                # seconds. One gathers some 200,000 rows/s.
                compute=ActorPoolStrategy(size=actors),
            )
        return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))

    def in_order(self, rows: RowRanges, batch_rows: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """This worker's share of some rows; the shares of the workers differ by one row at most."""
        share = shard_for_rank(rows.ids(), rank, world_size)
        for start in range(0, len(share), batch_rows):
            yield self._gather(share[start : start + batch_rows])

    def sample(self, rows: RowRanges, limit: int) -> RowRanges:
        """At most `limit` of the rows, evenly spaced."""
        ids = rows.at(np.linspace(0, len(rows) - 1, min(len(rows), limit)).astype(np.int64))
        return RowRanges.from_ids(ids)
