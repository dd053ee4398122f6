"""Counts of scored rows for line, manifest and report, taken from the columns of the output alone."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import DIGITS, ReasonCounts, decode_numbers, one_chunk
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.parts import Part

_UNSURE: Final = 20
"""Least sure rows that the report shows."""


@dataclass
class RowCounts(ReasonCounts):
    """Counts over rows; the rejected ones by reason."""

    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected rows by input file."""
    consistent: int = 0
    """Scored rows whose predicted sum is the predicted digit + number."""
    bad_labels: int = 0
    """Scored rows whose label is no digit, and counts as unknown. A null is unknown, and is not counted here."""
    reliability: dict[str, Reliability] = field(default_factory=lambda: {head.name: Reliability() for head in HEADS})
    """By head, over the rows whose label is known."""
    confusion: list[list[int]] = field(default_factory=lambda: [[0] * DIGITS for _ in range(DIGITS)])
    """Scored rows whose label is known, by label and predicted digit."""
    unsure: list[tuple[Any, ...]] = field(default_factory=list)
    """The rows whose digit is least sure: `digit_prob`, input file, row, predicted digit, number, label or None."""

    def add(self, other: "RowCounts") -> None:
        """Add the counts of other rows, in place."""
        self.rows += other.rows
        self.rejected.update(other.rejected)
        self.consistent += other.consistent
        self.bad_labels += other.bad_labels
        self.confusion = np.add(self.confusion, other.confusion).tolist()
        for head, sums in other.reliability.items():
            self.reliability[head].add(sums)
        self.add_reasons(other)
        self.unsure = sorted(self.unsure + other.unsure, key=lambda row: row[:3])[:_UNSURE]

    @property
    def labelled(self) -> int:
        """Number of scored rows whose label is known."""
        return sum(self.reliability[HEADS[0].name].rows)

    def accuracies(self) -> dict[str, float | None]:
        """Share of the labelled rows that each head predicts right, as `<head>_accuracy`; None without labelled rows."""
        known = self.labelled
        return {f"{head}_accuracy": sum(sums.right) / known if known else None for head, sums in self.reliability.items()}


def columns_to_count(config: ScoreConfig) -> list[str]:
    """Columns of an output file that `count_part` needs."""
    names = [config.number_column, "consistent", "reason"]
    if config.label_column not in (None, config.number_column):
        names.append(str(config.label_column))
    for head in HEADS:
        names += [f"pred_{head.name}", f"{head.name}_prob"]
    return names


def count_part(output: pa.Table, part: Part, config: ScoreConfig) -> RowCounts:
    """Count the rows of a part; `output` has the columns of its output file."""
    is_bad = output["reason"].is_valid().to_numpy()
    good = output.filter(pa.array(~is_bad))
    counts = RowCounts(rows=part.rows, consistent=pc.sum(good["consistent"]).as_py() or 0)
    if is_bad.any():
        bad_rows = (part.first_row + np.flatnonzero(is_bad)).tolist()
        reasons = output["reason"].filter(pa.array(is_bad)).to_pylist()
        bad = [(part.name, row, reason) for row, reason in zip(bad_rows, reasons, strict=True)]
        counts.add_reasons(ReasonCounts.of(bad))
        counts.rejected[part.name] = len(bad)

    numbers, _ = decode_numbers(one_chunk(good[config.number_column]))
    labels, counts.bad_labels = _labels(good, config)
    known = labels >= 0
    digits = good["pred_digit"].to_numpy()
    cells = np.bincount(labels[known] * DIGITS + digits[known], minlength=DIGITS * DIGITS)
    counts.confusion = cells.reshape(DIGITS, DIGITS).tolist()
    for head in HEADS:
        right = good[f"pred_{head.name}"].to_numpy() == head.target(labels, numbers)
        counts.reliability[head.name] = Reliability.of(good[f"{head.name}_prob"].to_numpy()[known], right[known])
    rows = part.first_row + np.flatnonzero(~is_bad)
    probabilities = good["digit_prob"].to_numpy()
    for index in np.argsort(probabilities, kind="stable")[:_UNSURE].tolist():
        label = int(labels[index]) if known[index] else None
        answer = (int(digits[index]), int(numbers[index]), label)
        counts.unsure.append((float(probabilities[index]), part.name, int(rows[index]), *answer))
    return counts


def _labels(rows: pa.Table, config: ScoreConfig) -> tuple[npt.NDArray[np.int64], int]:
    """The true digits, int64[n], -1 where unknown; and the number of labels that are neither a digit nor null."""
    if not config.label_column:
        return np.full(rows.num_rows, -1), 0
    column = one_chunk(rows[config.label_column])
    labels, unknown = decode_numbers(column, DIGITS)
    labels[list(unknown)] = -1
    return labels, len(unknown) - column.null_count
