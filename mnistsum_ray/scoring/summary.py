"""Counts of rows for the report, of a part when it is written and of the whole output; the result and the console's lines."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import DIGITS, HEADS
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.output import REPORT
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.stamp import PREDICTIONS

BINS: Final = 20
"""Bins of equal width over 0..1, in which rows are counted by the probability of each head."""

_REASONS_ON_CONSOLE: Final = 10

_EXAMPLES: Final = 3
"""Rows that are named for each reason."""

_UNSURE: Final = 20
"""The least sure rows that are named; some may be missing where a part has more of them than it names."""

_PARTS_AT_ONCE: Final = 10_000
"""Parts whose counts are Python objects at the same time."""


@dataclass
class Counts:
    """Counts over rows: of a part, as JSON in the metadata of its files, or of a whole output."""

    consistent: int = 0
    """Scored rows whose predicted sum is the predicted digit + number."""
    digits: list[int] = field(default_factory=lambda: [0] * DIGITS)
    """Scored rows by predicted digit."""
    numbers: list[int] = field(default_factory=lambda: [0] * NUMBERS)
    """Scored rows by number."""
    probabilities: dict[str, list[int]] = field(default_factory=lambda: {f"{head.name}_prob": [0] * BINS for head in HEADS})
    """Scored rows by the probability of each head, in bins of equal width over 0..1."""
    reliability: dict[str, Reliability] = field(default_factory=lambda: {head.name: Reliability() for head in HEADS})
    """By head, over the rows whose label is known."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows by reason."""
    examples: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Some rejected rows by reason: input file and row."""
    unsure: list[list[Any]] = field(default_factory=list)
    """Rows whose digit is least sure: `digit_prob`, input file, row, predicted digit, number."""

    @classmethod
    def of_output(cls, parts: pa.Table) -> "Counts":
        """Add up the counts of parts, `output.match`. Those that another version has counted add nothing."""
        total = cls()
        for batch in parts.to_batches(max_chunksize=_PARTS_AT_ONCE):
            for text in batch["counts"].to_pylist():
                counts = json.loads(text)
                sums = {head: Reliability(**of_head) for head, of_head in counts.pop("reliability", {}).items()}
                total.add(cls(**counts, reliability=sums))
            total.unsure = sorted(total.unsure)[:_UNSURE]
        total.reasons = dict(Counter(total.reasons).most_common())
        return total

    def add(self, other: "Counts") -> None:
        """Add the counts of other rows, in place."""
        self.consistent += other.consistent
        histograms = ((self.probabilities[name], counts) for name, counts in other.probabilities.items())
        for total, added in ((self.digits, other.digits), (self.numbers, other.numbers), *histograms):
            total[:] = map(int.__add__, total, added)
        for head, sums in other.reliability.items():
            self.reliability[head].add(sums)
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for reason, rows in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + rows)[:_EXAMPLES]
        self.unsure += other.unsure

    @property
    def labelled(self) -> int:
        """Number of scored rows whose label is known."""
        return sum(self.reliability[HEADS[0].name].rows)

    def accuracies(self) -> dict[str, float | None]:
        """Share of the labelled rows that each head predicts right, as `<head>_accuracy`; None without labelled rows."""
        known = self.labelled
        return {f"{head}_accuracy": sum(sums.right) / known if known else None for head, sums in self.reliability.items()}

    def probability_metrics(self) -> dict[str, dict[str, Any]] | None:
        """By head `nll`, `brier`, `ece`, and the `reliability` that they follow from; None if no label is known."""
        return {head: sums.as_json() for head, sums in self.reliability.items()} if self.labelled else None


def result_line(plan: Plan, files: pa.Table, counts: Counts, resumed_rows: int, scoring_seconds: float) -> dict[str, Any]:
    """Return the fields of the job's last line, but for `seconds`.

    Args:
        plan: of the run.
        files: `output.FILES_SCHEMA`.
        counts: over all rows.
        resumed_rows: rows that an earlier run had committed.
        scoring_seconds: from the start of the first part to the end of the last one.
    """
    usable = pc.equal(files["status"], "scored")
    columns = (files["rows"].filter(usable), files["scored"], files["rejected"], pc.invert(usable))
    input_rows, scored, rejected, failed = (pc.sum(column).as_py() or 0 for column in columns)
    return {
        "output": plan.output.display,
        "input_rows": input_rows,
        "scored_rows": scored,
        "rejected_rows": rejected,
        "resumed_rows": resumed_rows,
        "files": files.num_rows,
        "failed_files": failed,
        "rows_per_second": round((scored + rejected - resumed_rows) / scoring_seconds, 1) if scoring_seconds else 0.0,
    } | (counts.accuracies() if plan.config.label_column else {})


def summarize(line: dict[str, Any], counts: Counts, new_rejected: int, say: Callable[[str], None]) -> None:
    """Say the counts, the reasons for rejected rows, the share of consistent rows, and with labels the accuracies.

    Args:
        line: the fields of the job's last line.
        counts: over all rows.
        new_rejected: rows that this run has rejected. If there are none, the reasons are left out: an earlier run has said them.
        say: writes a console line.
    """
    say(
        f"{line['scored_rows']:,} of {line['input_rows']:,} rows scored, {line['rejected_rows']:,} rejected, in "
        f"{line['files'] - line['failed_files']:,} files; {line['failed_files']:,} files could not be used; all rows of the "
        "others are in the output exactly once"
    )
    reasons = list(counts.reasons.items()) if new_rejected else []
    for reason, count in reasons[:_REASONS_ON_CONSOLE]:
        say(f"  rejected: {count:,} x {reason}")
    if len(reasons) > _REASONS_ON_CONSOLE:
        say(f"  rejected: {sum(count for _, count in reasons[_REASONS_ON_CONSOLE:]):,} x other reasons")
    if line["scored_rows"]:
        say(f"consistent (sum = digit + number): {counts.consistent / line['scored_rows']:.2%} of the scored rows")
    if counts.labelled:
        accuracies = ", ".join(f"{head.name} {line[f'{head.name}_accuracy']:.2%}" for head in HEADS)
        say(f"accuracy over {counts.labelled:,} labelled rows: {accuracies}")
        for name, metrics in (counts.probability_metrics() or {}).items():
            say(
                f"  {name} probabilities: negative log-likelihood {metrics['nll']:.4f} nats, Brier score {metrics['brier']:.4f}, "
                f"expected calibration error {metrics['ece']:.4f}"
            )
    say(f"predictions: {line['output']}/{PREDICTIONS}")
    say(f"report: {line['output']}/{REPORT}")
