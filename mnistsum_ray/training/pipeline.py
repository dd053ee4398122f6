"""Ray Data pipeline of training: read and decode once, then stream shuffled rows to each worker.

    source ──read, decode──▶ blocks in the object store ──gather──▶ rank 0: step 0, step 1, … of every epoch
                             (uint8, in row id order)      └──────▶ rank 1: …

One execution per worker streams all remaining epochs. The order of every epoch is known beforehand (data/sampling.py), so the
first batches of the next epoch are ready before this one ends, and a worker's rows depend on (seed, epoch, rank, world size) and
on nothing that a scheduler decides. Ray's `streaming_split` would drop up to one row a worker, and a new execution for each epoch
would cost its start-up each time.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import TaskPoolStrategy
from ray.data.dataset import MaterializedDataset

from mnistsum_ray.cluster.data_context import ray_data_options
from mnistsum_ray.data.pixels import SIDE
from mnistsum_ray.data.sampling import RowIds, shard_for_rank
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, RowCountError
from mnistsum_ray.training.gather import Gather, digits_of, images_of, read_source_part, training_rows
from mnistsum_ray.training.schedule import Schedule

Batch = dict[str, torch.Tensor]
"""image uint8[n, 28, 28], digit int64[n], row_id int64[n]; in training also number int64[n] and, with --distortion, draws
float32[n, DISTORTION_DRAWS]; all on the worker's device."""

_TASK_CPUS: Final = 0
"""Tasks reserve no CPU, so busy workers cannot deadlock them, even when a node is lost and the others are full."""

_EVALUATION_BATCH: Final = 250


@dataclass(frozen=True)
class MaterializedSource:
    """A data source in the object store."""

    images: MaterializedDataset
    """Columns `image` (784 bytes) and `digit` int8, in row id order."""
    fingerprint: str
    """SHA-256 over all pixels and digits in row id order, and over the row ids of the three splits."""
    lineage: ray.data.Dataset | None
    """The dataset that `images` was computed from. While a reference exists, Ray can compute blocks of a lost node again."""


def materialize_source(source: Source) -> MaterializedSource:
    """Read and decode every row on the cluster.

    Raises:
        RequestError: a file or a row cannot be used; the message names it.
        RowCountError: the files hold more or fewer rows than their footers say.
    """
    with ray_data_options(preserve_order=True):
        lineage, images = _materialize(source)
    digest, rows = hashlib.sha256(), 0
    for block in images.to_arrow_refs():
        table: pa.Table = ray.get(block)
        if "error" in table.column_names and table["error"].null_count < table.num_rows:
            raise RequestError(table["error"].drop_null()[0].as_py())
        rows += table.num_rows
        digest.update(np.ascontiguousarray(images_of(table)).data)
        digest.update(np.ascontiguousarray(digits_of(table)).data)
    if rows != source.rows:
        raise RowCountError(f"read {rows:,} rows of {source.location}, whose files hold {source.rows:,}")
    for split in (source.train, source.validation, source.test):
        digest.update(f"{len(split)} rows".encode() + np.ascontiguousarray(split, np.int64).tobytes())
    return MaterializedSource(images, digest.hexdigest(), lineage)


def _materialize(source: Source) -> tuple[ray.data.Dataset | None, MaterializedDataset]:
    if all(isinstance(part, pa.Table) for part in source.parts):
        return None, ray.data.from_arrow(list(source.parts)).materialize()
    # Parts are named by index: a column of Python objects would need Ray's Arrow type for pickled objects.
    indices = [{"part": index} for index in range(len(source.parts))]
    lineage = ray.data.from_items(indices, override_num_blocks=len(indices))
    tasks = TaskPoolStrategy(size=min(len(indices), max(1, int(ray.cluster_resources().get("CPU", 1)))))
    parts = lineage.map_batches(
        read_source_part, fn_args=(source.parts,), batch_format="pyarrow", batch_size=1, num_cpus=_TASK_CPUS, compute=tasks
    )
    return lineage, parts.materialize()


def training_batches(images: MaterializedDataset, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
    """This worker's share of each step of all remaining epochs, in order, as uint8 on the device."""
    tasks = schedule.tasks()
    blocks = _training_blocks(images, schedule, [task for task in tasks if schedule.task_rows(task)], device)
    empty = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in ("digit", "row_id", "number")}
    empty["image"] = torch.zeros((0, SIDE, SIDE), dtype=torch.uint8, device=device)
    for task in tasks:
        rows = schedule.task_rows(task)
        block = next(blocks) if rows else empty  # Ray Data yields no empty blocks
        if len(block["row_id"]) != rows:
            # Only this rank knows. An exception ends the other ranks too, which a RowCountError, returned as a value, would not.
            raise AssertionError(f"a block of epoch {task['epoch'] + 1} has {len(block['row_id'])} rows, not {rows}")
        start = 0
        for step in range(task["first"], task["last"]):
            end = start + schedule.share_rows(step)
            yield {name: values[start:end] for name, values in block.items()}
            start = end


def _training_blocks(
    images: MaterializedDataset, schedule: Schedule, tasks: list[dict[str, int]], device: torch.device
) -> Iterator[Batch]:
    """The rows of each task, in order."""
    if not tasks:
        return iter(())
    on_gpu = device.type == "cuda"
    with ray_data_options(preserve_order=True):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            training_rows,
            fn_kwargs={"gather": Gather(images), "schedule": schedule},
            batch_size=1,
            num_cpus=_TASK_CPUS,
            # Limited, since Ray would start a process for each waiting task. One process gathers some 200,000 rows/s.
            compute=TaskPoolStrategy(size=2 if on_gpu else 1),
        )
    return iter(dataset.iter_torch_batches(batch_size=None, prefetch_batches=2, device=device, pin_memory=on_gpu))


def evaluation_batches(
    images: MaterializedDataset, row_ids: RowIds, rank: int, world_size: int, device: torch.device
) -> list[Batch]:
    """This worker's share of rows, undistorted and without numbers, as uint8 batches that stay on the device: 0.8 KB a row."""
    gather, share = Gather(images), shard_for_rank(row_ids, rank, world_size)
    return [
        {
            name: torch.as_tensor(values, device=device)
            for name, values in gather(share[start : start + _EVALUATION_BATCH]).items()
        }
        for start in range(0, len(share), _EVALUATION_BATCH)
    ]
