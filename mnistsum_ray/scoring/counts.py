"""Counts of scored rows for the result and the report, from the columns of the output alone."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.config import ScoreConfig
from mnistsum_ray.data.images import DIGITS, ReasonCounts, decode_numbers, one_chunk
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.parts import Part


@dataclass
class RowCounts:
    """Counts over rows."""

    rows: int = 0
    bad: ReasonCounts = field(default_factory=ReasonCounts)
    """Rejected rows by reason."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected rows by input file."""
    consistent: int = 0
    """Scored rows whose predicted sum is the predicted digit + number."""
    reliability: dict[str, Reliability] = field(
        default_factory=lambda: {head.name: Reliability() for head in HEADS}
    )
    """By head, over the scored rows whose label is known."""
    confusion: list[list[int]] = field(
        default_factory=lambda: [[0] * DIGITS for _ in range(DIGITS)]
    )
    """Scored rows whose label is known, by label and predicted digit."""

    def add(self, other: "RowCounts") -> None:
        """Add the counts of other rows, in place."""
        self.rows += other.rows
        self.bad.add_reasons(other.bad)
        self.rejected.update(other.rejected)
        self.consistent += other.consistent
        self.confusion = np.add(self.confusion, other.confusion).tolist()
        for head, sums in other.reliability.items():
            self.reliability[head].add(sums)

    @property
    def labelled(self) -> int:
        """Number of scored rows whose label is known."""
        return sum(self.reliability[HEADS[0].name].rows)

    def accuracies(self) -> dict[str, float | None]:
        """Share of the labelled rows that a head predicts right; None without labelled rows."""
        known = self.labelled
        found = {}
        for head, sums in self.reliability.items():
            found[f"{head}_accuracy"] = sum(sums.right) / known if known else None
        return found


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
        counts.bad = ReasonCounts.of(bad)
        counts.rejected[part.name] = len(bad)
    if not config.label_column:
        return counts
    numbers, _ = decode_numbers(one_chunk(good[config.number_column]))
    labels, unknown = decode_numbers(one_chunk(good[config.label_column]), DIGITS)
    known = np.ones(len(labels), dtype=bool)
    known[list(unknown)] = False
    cells = labels[known] * DIGITS + good["pred_digit"].to_numpy()[known]
    counts.confusion = np.bincount(cells, minlength=DIGITS**2).reshape(DIGITS, DIGITS).tolist()
    for head in HEADS:
        right = good[f"pred_{head.name}"].to_numpy() == head.target(labels, numbers)
        probability = good[f"{head.name}_prob"].to_numpy()
        counts.reliability[head.name] = Reliability.of(probability[known], right[known])
    return counts
