"""Held-out rows: scored and counted, by all workers together or by one of them."""

from collections.abc import Iterator
from functools import partial
from typing import Final

import numpy as np
from torch import Tensor

from mnistsum_ray.data.randomness import RowIds, mix_ids
from mnistsum_ray.model.device import array_to_device
from mnistsum_ray.model.metrics import AnswerCounts, LabelledRows, Metrics, score_rows
from mnistsum_ray.model.network import Network, score_digits
from mnistsum_ray.reporting.console import Progress
from mnistsum_ray.training.rows import RowBlocks
from mnistsum_ray.training.worker import Worker

_BATCH_ROWS: Final = {"cpu": 250, "cuda": 2_000}
"""Held-out rows that are scored together."""

_FETCHED_ROWS: Final = 100_000
"""Held-out rows that are copied together, 0.8 KB each: they may be spread over all blocks, and of
spilled ones each is restored once."""

ScoredDigits = list[tuple[LabelledRows, Tensor]]
"""Batches of `digit` and `row_id`, with digit scores [n, 10]."""


class HeldOutRows:
    """Held-out rows of one rank, undistorted and without numbers. Each row belongs to one rank.

    Rows are scored in two passes: `digit_scores`, nearly all of the work, and with these `metrics`,
    which are taken again after the sum head was fine-tuned.
    """

    def __init__(self, blocks: RowBlocks, all_ids: RowIds, worker: Worker) -> None:
        self._blocks = blocks
        self._all_ids = all_ids
        self._worker = worker
        rank, world_size = worker.rank, worker.world_size
        start = len(all_ids) * rank // world_size
        self._ids = all_ids[start : len(all_ids) * (rank + 1) // world_size]

    def _batches(self) -> Iterator[LabelledRows]:
        """The rows on the device, copied from their blocks."""
        device = self._worker.device
        for start in range(0, len(self._ids), _FETCHED_ROWS):
            ids = self._ids[start : start + _FETCHED_ROWS]
            images, digits = self._blocks.fetch(ids)
            for first in range(0, len(ids), _BATCH_ROWS[device.type]):
                rows = slice(first, first + _BATCH_ROWS[device.type])
                yield {
                    "image": array_to_device(images[rows], device),
                    "digit": array_to_device(digits[rows].astype(np.int64), device),
                    "row_id": array_to_device(ids[rows], device),
                }

    def digit_scores(self, model: Network, *, bf16: bool) -> ScoredDigits:
        """Score the digits of this rank's rows."""
        model.eval()
        scored = []
        show = partial(self._worker.send, "counter")
        on_progress = Progress(show, "rows evaluated", len(self._all_ids))
        for batch in self._batches():
            images = batch.pop("image")
            scores = score_digits(model, images, bf16=bf16)
            scored.append((batch, scores))
            # An estimate: the other workers are about as far.
            on_progress(len(scores) * self._worker.world_size)
        return scored

    def metrics(self, model: Network, scored: ScoredDigits) -> Metrics:
        """Metrics with all numbers, of what `digit_scores` gives; over all workers.

        Raises:
            RowCountError: a row was lost or repeated.
        """
        counts = AnswerCounts(self._worker.device)
        for labels, scores in score_rows(model, scored):
            counts.add(labels, scores)
        if self._worker.world_size > 1:
            counts.all_reduce()
        return counts.metrics(len(self._all_ids), int(mix_ids(self._all_ids).sum()))
