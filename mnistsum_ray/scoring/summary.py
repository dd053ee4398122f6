"""Counts of scored rows for the report: of a part, when it is written, and their totals; the result and the console's lines."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import DIGITS, HEADS
from mnistsum_ray.model.inference import Predictions
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.output import REPORT
from mnistsum_ray.scoring.preflight import Plan
from mnistsum_ray.scoring.stamp import PREDICTIONS

OTHER_REASONS: Final = "other reasons"

_BINS: Final = 20
"""Bins of equal width over 0..1, in which rows are counted by the probability of each head."""

_MAX_REASONS: Final = 20
"""Reasons that a file's metadata counts separately, so that a file with many different bad rows stays small."""

_REASONS_ON_CONSOLE: Final = 10

_EXAMPLES: Final = 3
"""Rows that are named for each reason."""

_UNSURE_IN_PART: Final = 3
_UNSURE: Final = 20
"""The least sure rows of a part, and of a run, that are named. A run may miss some where a part has more of them."""

_PARTS_AT_ONCE: Final = 10_000
"""Parts whose counts are Python objects at the same time."""


def count_rows(
    rows: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64] | None,
    predictions: Predictions,
    reasons: dict[int, str],
) -> dict[str, Any]:
    """Count the rows of a part, as JSON. `Totals` adds the counts of all parts up.

    Args:
        rows: index of each of n scored rows in the input file, int64[n].
        numbers: their numbers, int64[n].
        labels: their true digits, int64[n], -1 where unknown; None without a label column.
        predictions: n predictions.
        reasons: why each rejected row cannot be scored, by its index in the input file, in ascending order.
    """
    unsure = np.argsort(predictions.digit_prob, kind="stable")[:_UNSURE_IN_PART]
    sureness = predictions.digit_prob[unsure].astype(float).round(3)
    commonest = Counter(reasons.values()).most_common(_MAX_REASONS)
    others = len(reasons) - sum(count for _, count in commonest)
    first_rows = {reason: row for row, reason in reversed(reasons.items())}
    counts: dict[str, Any] = {
        "consistent": int(predictions.columns(numbers)[-1].sum()),
        "digits": np.bincount(predictions.digit, minlength=DIGITS).tolist(),
        "numbers": np.bincount(numbers, minlength=NUMBERS).tolist(),
        "unsure": [values.tolist() for values in (sureness, rows[unsure], predictions.digit[unsure], numbers[unsure])],
        "reasons": dict(commonest) | ({OTHER_REASONS: others} if others else {}),
        "examples": {reason: first_rows[reason] for reason, _ in commonest},
        "reliability": {},
    }
    for head in HEADS:
        probability = predictions.values[f"{head.name}_prob"]
        counts[f"{head.name}_prob"] = np.histogram(probability, _BINS, (0, 1))[0].tolist()
        if labels is not None:
            known = labels >= 0
            right = predictions.values[f"pred_{head.name}"][known] == head.target(labels, numbers)[known]
            losses = (predictions.values[f"{head.name}_{loss}"][known] for loss in ("nll", "brier"))
            counts["reliability"][head.name] = vars(Reliability.from_predictions(probability[known], right, *losses))
    return counts


@dataclass
class Totals:
    """Counts over all rows of an output, those of earlier runs included."""

    input_rows: int
    scored_rows: int
    rejected_rows: int
    files: int
    failed_files: int
    consistent: int = 0
    digits: list[int] = field(default_factory=lambda: [0] * DIGITS)
    """Scored rows by predicted digit."""
    numbers: list[int] = field(default_factory=lambda: [0] * NUMBERS)
    """Scored rows by number."""
    probabilities: dict[str, list[int]] = field(default_factory=lambda: {f"{head.name}_prob": [0] * _BINS for head in HEADS})
    """Scored rows by the probability of each head, in bins of equal width over 0..1."""
    reliability: dict[str, Reliability] = field(default_factory=lambda: {head.name: Reliability() for head in HEADS})
    """By head, over the rows whose label is known."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows by reason, the commonest first."""
    examples: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Some rejected rows by reason: input file and row."""
    unsure: list[tuple[float, str, int, int, int]] = field(default_factory=list)
    """Rows whose digit is least sure: `digit_prob`, input file, row, predicted digit, number."""

    @classmethod
    def of_output(cls, files: pa.Table, matched: pa.Table) -> "Totals":
        """Add up the rows of all files, and the counts of their parts.

        Args:
            files: `output.FILES_SCHEMA`.
            matched: `output.match` of the parts of these files.
        """
        usable = pc.equal(files["status"], "scored")
        counted = (files["rows"].filter(usable), files["scored"], files["rejected"], pc.invert(usable))
        rows, scored, rejected, failed = (pc.sum(column).as_py() or 0 for column in counted)
        totals = cls(rows, scored, rejected, files.num_rows, failed)
        for batch in matched.select(["name", "counts"]).to_batches(max_chunksize=_PARTS_AT_ONCE):
            for name, counts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                totals._add(name, json.loads(counts))
            totals.unsure = sorted(totals.unsure)[:_UNSURE]
        totals.reasons = dict(Counter(totals.reasons).most_common())
        return totals

    def _add(self, name: str, counts: dict[str, Any]) -> None:
        """Add the counts of a part of an input file. A part that was counted by another version adds nothing."""
        if not counts:
            return
        self.consistent += counts["consistent"]
        for total, added in (
            (self.digits, counts["digits"]),
            (self.numbers, counts["numbers"]),
            *((histogram, counts[column]) for column, histogram in self.probabilities.items()),
        ):
            total[:] = map(int.__add__, total, added)
        for head, sums in counts["reliability"].items():
            self.reliability[head].add(Reliability(**sums))
        for reason, count in counts["reasons"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for reason, row in counts["examples"].items():
            if len(self.examples.setdefault(reason, [])) < _EXAMPLES:
                self.examples[reason].append((name, row))
        self.unsure += [(probability, name, *place) for probability, *place in zip(*counts["unsure"], strict=True)]

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


def result_line(plan: Plan, totals: Totals, resumed_rows: int, scoring_seconds: float, seconds: float) -> dict[str, Any]:
    """Return the fields of the job's last line.

    Args:
        plan: of the run.
        totals: over all rows.
        resumed_rows: rows that an earlier run had committed.
        scoring_seconds: from the start of the first part to the end of the last one.
        seconds: since the run started.
    """
    new_rows = totals.scored_rows + totals.rejected_rows - resumed_rows
    return {
        "output": plan.output.display,
        "input_rows": totals.input_rows,
        "scored_rows": totals.scored_rows,
        "rejected_rows": totals.rejected_rows,
        "resumed_rows": resumed_rows,
        "files": totals.files,
        "failed_files": totals.failed_files,
        "rows_per_second": round(new_rows / scoring_seconds, 1) if scoring_seconds else 0.0,
        "seconds": round(seconds, 1),
    } | (totals.accuracies() if plan.config.label_column else {})


def summarize(line: dict[str, Any], totals: Totals, new_rejected: int, say: Callable[[str], None]) -> None:
    """Say the counts, the reasons for rejected rows, the share of consistent rows, and with labels the accuracies.

    Args:
        line: the fields of the job's last line.
        totals: over all rows.
        new_rejected: rows that this run has rejected. If there are none, the reasons are left out: an earlier run has said them.
        say: writes a console line.
    """
    say(
        f"{line['scored_rows']:,} of {line['input_rows']:,} rows scored, {line['rejected_rows']:,} rejected, in "
        f"{line['files'] - line['failed_files']:,} files; {line['failed_files']:,} files could not be used; all rows of the "
        "others are in the output exactly once"
    )
    reasons = list(totals.reasons.items()) if new_rejected else []
    for reason, count in reasons[:_REASONS_ON_CONSOLE]:
        say(f"  rejected: {count:,} x {reason}")
    if len(reasons) > _REASONS_ON_CONSOLE:
        say(f"  rejected: {sum(count for _, count in reasons[_REASONS_ON_CONSOLE:]):,} x other reasons")
    if line["scored_rows"]:
        say(f"consistent (sum = digit + number): {totals.consistent / line['scored_rows']:.2%} of the scored rows")
    if totals.labelled:
        accuracies = ", ".join(f"{head.name} {line[f'{head.name}_accuracy']:.2%}" for head in HEADS)
        say(f"accuracy over {totals.labelled:,} labelled rows: {accuracies}")
        for name, metrics in (totals.probability_metrics() or {}).items():
            say(
                f"  {name} probabilities: negative log-likelihood {metrics['nll']:.4f} nats, Brier score {metrics['brier']:.4f}, "
                f"expected calibration error {metrics['ece']:.4f}"
            )
    say(f"predictions: {line['output']}/{PREDICTIONS}")
    say(f"report: {line['output']}/{REPORT}")
