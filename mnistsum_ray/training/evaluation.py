"""Held-out rows on a worker, and the metrics on them."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from torch import Tensor

from mnistsum_ray.data.order import RowIds, mix_ids
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.model.metrics import AnswerCounts, LabelledRows, Metrics, score_rows
from mnistsum_ray.model.network import Network, undistorted_digit_scores
from mnistsum_ray.training.pipeline import RowBlocks
from mnistsum_ray.training.worker import Worker

_CHUNK_ROWS: Final = 100_000
"""Held-out rows that are in memory at once, 0.8 KB each. As many stay there between epochs."""

_BATCH_ROWS: Final = {"cpu": 250, "cuda": 2_000}

Scored = list[tuple[LabelledRows, Tensor]]
"""Batches with their digit scores [n, 10]."""


class HeldOutRows:
    """Held-out rows of one rank, undistorted and without numbers. Each row belongs to one rank."""

    def __init__(self, blocks: RowBlocks, all_ids: RowIds, worker: Worker) -> None:
        self.all_ids = all_ids
        self.worker = worker
        self._blocks = blocks
        start, end = (len(all_ids) * rank // worker.world_size for rank in (worker.rank, worker.rank + 1))
        self._ids = all_ids[start:end]
        self._resident: list[LabelledRows] = []

    def batches(self) -> Iterator[LabelledRows]:
        """The rows on the device. Few of them stay there; more are copied from their blocks each time."""
        if self._resident:
            yield from self._resident
            return
        for start in range(0, len(self._ids), _CHUNK_ROWS):
            batches = list(self._chunk(self._ids[start : start + _CHUNK_ROWS]))
            if len(self._ids) <= _CHUNK_ROWS:
                self._resident = batches
            yield from batches

    def _chunk(self, ids: RowIds) -> Iterator[LabelledRows]:
        device = self.worker.device
        images, digits = self._blocks.fetch(ids)
        columns: dict[str, Any] = {"image": images, "digit": digits.astype(np.int64), "row_id": ids}
        size = _BATCH_ROWS[device.type]
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            yield {name: array_to_device(values[rows], device) for name, values in columns.items()}

    def scored(self, model: Network, *, bf16: bool) -> Iterator[tuple[LabelledRows, Tensor]]:
        """Digits and row ids of each batch, with its digit scores."""
        model.eval()
        on_progress = self.worker.events.progress("rows evaluated", len(self.all_ids))
        for batch in self.batches():
            labels = {name: batch[name] for name in ("digit", "row_id")}
            yield labels, undistorted_digit_scores(model, batch["image"], bf16=bf16)
            on_progress(len(batch["row_id"]) * self.worker.world_size)  # an estimate: the others are about as far


def metrics_of(model: Network, scored: "Scored | Iterator[tuple[LabelledRows, Tensor]]", rows: HeldOutRows) -> Metrics:
    """Metrics on held-out rows, with all numbers; each row is counted once over all workers.

    Raises:
        RowCountError: a row was lost or repeated.
    """
    counts = AnswerCounts(rows.worker.device)
    for labels, scores in score_rows(model, scored):
        counts.add(labels, scores)
    return counts.metrics(len(rows.all_ids), int(mix_ids(rows.all_ids).sum()))
