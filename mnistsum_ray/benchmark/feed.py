"""Speed of the training pipeline alone: rows are read, decoded, shuffled and handed to a worker that does not train."""

import io
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

from mnistsum_ray.benchmark.memory import BATCH
from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import Shuffle, check_row_counts
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.training.fetch import load_rows, stream_rows
from mnistsum_ray.training.rows import TrainingRows

_FILE_ROWS: Final = 50_000
_GROUP_ROWS: Final = 5_000
_SAMPLE_SECONDS: Final = 0.2
_DISTORTION: Final = 0.5
"""As in the short recipe: distortions travel with the rows."""


def write_rows(folder: Path, images: Pixels, digits: list[int], rows: int, *, png: bool) -> None:
    """Write the images, repeated up to a number of rows, as Parquet with raw bytes or PNG, and some of them as test rows."""
    values = [png_file(image) for image in images] if png else [image.tobytes() for image in images]
    table = pa.table({"image": pa.array(values, pa.binary()), "digit": pa.array(digits, pa.int8())})
    for split, count in (("train", rows), ("validation", 100), ("test", 100)):
        (folder / split).mkdir(parents=True)
        for start in range(0, count, _FILE_ROWS):
            ids = np.arange(start, min(start + _FILE_ROWS, count)) % table.num_rows
            name = folder / split / f"{start // _FILE_ROWS:05d}.parquet"
            pq.write_table(table.take(pa.array(ids)), name, row_group_size=_GROUP_ROWS)


def png_file(image: Pixels) -> bytes:
    """The image uint8[28, 28] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@dataclass
class _Usage:
    """CPU time and memory of all processes that this one has started, and of itself."""

    peak_bytes: int = 0
    _cpu_seconds: dict[int, float] = field(default_factory=dict)
    """By process; those that have ended stay."""

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu_seconds.values())

    def sample(self) -> None:
        """Look at the processes; memory that they share counts once."""
        memory = 0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:
                times, info = process.cpu_times(), process.memory_full_info()
            except psutil.Error:  # it has ended
                continue
            self._cpu_seconds[process.pid] = times.user + times.system
            memory += getattr(info, "pss", info.uss)
        self.peak_bytes = max(self.peak_bytes, memory)


def feed(folder: Path, shuffle_rows: int) -> dict[str, float]:
    """Feed one epoch of the Parquet rows in a folder to a worker.

    Args:
        folder: see `write_rows`.
        shuffle_rows: as for jobs/train.py; with fewer than the training rows they are streamed.

    Returns:
        `rows_per_second` after the first batch, `cpu_us_per_row` of all processes after it, `first_batch_seconds`, and
        `memory_mib`, the most that all processes had together.

    Raises:
        RowCountError: a row was lost or repeated.
    """
    connect()
    source = open_source(str(folder))
    assert source.files is not None
    streamed = source.rows > shuffle_rows
    loaded = stream_rows(source.files) if streamed else load_rows(source)
    shuffle = Shuffle(source.train, source.files.group_bounds if streamed else None, BATCH, shuffle_rows, seed=0)
    rows = {
        "data": loaded.data,
        "shuffle": shuffle,
        "distortion": _DISTORTION,
        "epochs": 1,
        "rank": 0,
        "world_size": 1,
        "readers": max(1, int(ray.cluster_resources()["CPU"])) if streamed else 1,
    }
    worker = _FeedWorker.remote(rows)  # type: ignore[attr-defined]
    ray.get(worker.prepare.remote())
    started = time.perf_counter()
    ray.get(worker.first_batch.remote())
    first_batch = time.perf_counter() - started
    before, usage, done = _Usage(), _Usage(), threading.Event()
    before.sample()
    watcher = threading.Thread(target=_watch, args=(usage, done))
    watcher.start()
    started = time.perf_counter()
    try:
        total, first, ids = ray.get(worker.rest.remote())
        seconds = time.perf_counter() - started
    finally:
        done.set()
        watcher.join()
    check_row_counts(total, ids, len(source.train), source.train.id_sum, "the feed")
    return {
        "rows_per_second": (total - first) / seconds,
        "cpu_us_per_row": (usage.cpu_seconds - before.cpu_seconds) / (total - first) * 1e6,
        "first_batch_seconds": first_batch,
        "memory_mib": usage.peak_bytes / 2**20,
    }


def _watch(usage: _Usage, done: threading.Event) -> None:
    while not done.wait(_SAMPLE_SECONDS):
        usage.sample()
    usage.sample()


@ray.remote(num_cpus=0)
class _FeedWorker:
    """A worker that takes batches and does nothing with them."""

    def __init__(self, rows: dict[str, Any]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._batches = TrainingRows(**rows, device=device).batches()

    def prepare(self) -> None:
        """Return when the process has started."""

    def first_batch(self) -> None:
        ids = next(self._batches)["mixed_id"]
        self._first, self._id_sum = len(ids), int(ids.sum())

    def rest(self) -> tuple[int, int, int]:
        """All other batches; rows in all, rows of the first batch, and sum of the ids."""
        rows, id_sum = self._first, torch.zeros((), dtype=torch.int64)
        for batch in self._batches:
            rows += len(batch["row_id"])
            id_sum += batch["mixed_id"].sum().cpu()
        return rows, self._first, self._id_sum + int(id_sum)
