"""The Ray Data side of training: read and decode once, then stream shuffled pairs to each worker.

    source ──read, decode──▶ blocks in the object store ──gather──▶ rank 0: step 0, step 1, … of every epoch
                             (uint8, in row id order)      └──────▶ rank 1: …

One execution per worker streams all the epochs that are left: the order of every epoch is known beforehand
(pairs.py), so the next epoch's first batches are ready before this one ends, and a worker's rows depend on
(seed, epoch, rank, world size) and on nothing that a scheduler decides. `streaming_split` would drop up to a
row a worker, and a new execution each epoch costs its start-up each epoch.
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

from mnistsum_ray.cluster.data_context import quiet_ray_data
from mnistsum_ray.data.decoding import SIDE
from mnistsum_ray.data.sampling import RowIds, shard_for_rank
from mnistsum_ray.data.sources import Source
from mnistsum_ray.errors import RequestError, RowCountError
from mnistsum_ray.training.gather import Gather, digits_of, images_of, read_part, training_rows
from mnistsum_ray.training.schedule import Schedule

Batch = dict[str, torch.Tensor]
"""image uint8[n, 28, 28], digit int64[n], row_id int64[n], and in training number int64[n] and with --distortion
draws float32[n, DRAWS]; on the worker's device."""

_NO_CPUS: Final = 0
"""What the tasks here reserve: they do little, and one that had to wait for a CPU that the workers hold would wait for ever,
as when a node is lost and the others are full."""

EVALUATION_ROWS: Final = 250
"""Rows in one forward pass of an evaluation."""


def configure_ray_data() -> None:
    """Keep the order of rows, and leave it to the app to say what is going on."""
    quiet_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True


@dataclass(frozen=True)
class MaterializedSource:
    """A source in the object store."""

    images: MaterializedDataset
    """Columns `image` (784 bytes) and `digit` int8, in row id order."""
    fingerprint: str
    """SHA-256 over all pixels and digits in row id order, and over which rows are train, validation and test."""
    root: ray.data.Dataset | None
    """What `images` was read from: while it is held, Ray can read again what is lost with a node."""


def materialize_source(source: Source) -> MaterializedSource:
    """Read and decode every row on the cluster.

    Raises:
        RequestError: a row or a file is not what its footer promised.
    """
    root = None
    if all(isinstance(part, pa.Table) for part in source.parts):
        images = ray.data.from_arrow(list(source.parts)).materialize()
    else:
        # By number: a column of Python objects needs an Arrow type that scoring, in the same process, does without.
        root = ray.data.from_items([{"part": index} for index in range(len(source.parts))], override_num_blocks=len(source.parts))
        at_once = TaskPoolStrategy(size=min(len(source.parts), max(1, int(ray.cluster_resources().get("CPU", 1)))))
        images = root.map_batches(
            read_part, fn_args=(source.parts,), batch_format="pyarrow", batch_size=1, num_cpus=_NO_CPUS, compute=at_once
        ).materialize()
    digest, rows = hashlib.sha256(), 0
    for block in images.to_arrow_refs():
        table: pa.Table = ray.get(block)
        if "refusal" in table.column_names and table["refusal"].null_count < table.num_rows:
            raise RequestError(table["refusal"].drop_null()[0].as_py())
        rows += table.num_rows
        digest.update(np.ascontiguousarray(images_of(table)).data)
        digest.update(np.ascontiguousarray(digits_of(table)).data)
    if rows != source.rows:
        raise RowCountError(f"read {rows:,} rows of {source.location}, whose files hold {source.rows:,}")
    for split in (source.train, source.validation, source.test):
        digest.update(f"{len(split)} rows".encode() + np.ascontiguousarray(split, np.int64).tobytes())
    return MaterializedSource(images, digest.hexdigest(), root)


def training_batches(images: MaterializedDataset, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
    """This worker's share of every step of every epoch that is left, in order, as uint8 on the device."""
    tasks = schedule.tasks()
    busy = [task for task in tasks if schedule.task_rows(task)]
    blocks: Iterator[Batch] = iter(())
    if busy:
        stream = ray.data.from_items(busy, override_num_blocks=len(busy)).map_batches(
            training_rows,
            fn_kwargs={"gather": Gather(images), "schedule": schedule},
            batch_size=1,
            num_cpus=_NO_CPUS,
            # Bounded, or Ray starts a process for every waiting task. One gathers some 200,000 rows/s, in 20 ms each.
            compute=TaskPoolStrategy(size=2 if device.type == "cuda" else 1),
        )
        blocks = iter(
            stream.iter_torch_batches(batch_size=None, prefetch_batches=2, device=device, pin_memory=device.type == "cuda")
        )
    nothing = {name: torch.zeros(0, dtype=torch.int64, device=device) for name in ("digit", "row_id", "number")}
    nothing["image"] = torch.zeros((0, SIDE, SIDE), dtype=torch.uint8, device=device)
    for task in tasks:
        rows = schedule.task_rows(task)
        block = next(blocks) if rows else nothing  # Ray Data hands on no empty block
        if len(block["row_id"]) != rows:
            # On this worker alone: raised, and not told as RowCountError is, it ends the others too.
            raise AssertionError(f"a block of epoch {task['epoch'] + 1} has {len(block['row_id'])} rows, not {rows}")
        start = 0
        for step in range(task["first"], task["last"]):
            end = start + schedule.share_rows(step)
            yield {name: values[start:end] for name, values in block.items()}
            start = end


def evaluation_batches(
    images: MaterializedDataset, row_ids: RowIds, rank: int, world_size: int, device: torch.device
) -> list[Batch]:
    """This worker's share of rows as they are, without numbers or shifts: uint8 batches that stay on the device, 0.8 KB a row."""
    gather, share = Gather(images), shard_for_rank(row_ids, rank, world_size)
    return [
        {name: torch.as_tensor(values, device=device) for name, values in gather(share[start : start + EVALUATION_ROWS]).items()}
        for start in range(0, len(share), EVALUATION_ROWS)
    ]
