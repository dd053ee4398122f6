"""The result of a scoring run: the job's last line, and what the console says of it."""

from collections.abc import Callable
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.scoring.output import REPORT
from mnistsum_ray.scoring.preflight import ScoringRun
from mnistsum_ray.scoring.stamp import PREDICTIONS
from mnistsum_ray.scoring.totals import Totals

_MAX_REASONS: Final = 10
"""Reasons for rejected rows that the console names."""


def result_line(
    run: ScoringRun, files: pa.Table, totals: Totals, resumed_rows: int, scoring_seconds: float, seconds: float
) -> dict[str, Any]:
    """Return the fields of the job's last line.

    Args:
        run: the checked request.
        files: `reconcile.FILES_SCHEMA`.
        totals: over all rows.
        resumed_rows: rows that an earlier run had committed.
        scoring_seconds: from the start of the first part to the end of the last one.
        seconds: since the run started.
    """
    new_rows = totals.scored_rows + totals.rejected_rows - resumed_rows
    line: dict[str, Any] = {
        "output": run.output.display,
        "input_rows": totals.input_rows,
        "scored_rows": totals.scored_rows,
        "rejected_rows": totals.rejected_rows,
        "resumed_rows": resumed_rows,
        "files": files.num_rows,
        "failed_files": count_failed(files),
        "rows_per_second": round(new_rows / scoring_seconds, 1) if scoring_seconds else 0.0,
        "seconds": round(seconds, 1),
    }
    if run.columns.label:
        labelled = totals.counts.get("labelled", 0)
        for head in HEADS:
            line[f"{head.name}_accuracy"] = totals.counts[f"{head.name}s_right"] / labelled if labelled else None
    return line


def count_failed(files: pa.Table) -> int:
    """Number of files in a `reconcile.FILES_SCHEMA` table that could not be used."""
    return pc.sum(pc.equal(files["status"], "failed")).as_py() or 0


def summarize(line: dict[str, Any], totals: Totals, new_rejected: int, say: Callable[[str], None]) -> None:
    """Write the counts, the reasons for rejected rows, the share of consistent rows, and with labels the accuracies.

    The reasons are left out if this run has rejected no row: an earlier run has named them.
    """
    say(
        f"{line['scored_rows']:,} of {line['input_rows']:,} rows scored, {line['rejected_rows']:,} rejected, in "
        f"{line['files'] - line['failed_files']:,} files; {line['failed_files']:,} files could not be used; all rows of the "
        "others are in the output exactly once"
    )
    reasons = list(totals.reasons.items()) if new_rejected else []
    for reason, count in reasons[:_MAX_REASONS]:
        say(f"  rejected: {count:,} x {reason}")
    if len(reasons) > _MAX_REASONS:
        say(f"  rejected: {sum(count for _, count in reasons[_MAX_REASONS:]):,} x other reasons")
    if line["scored_rows"]:
        say(f"consistent (sum = digit + number): {totals.counts['consistent'] / line['scored_rows']:.2%} of the scored rows")
    if totals.counts.get("labelled"):
        accuracies = ", ".join(f"{head.name} {line[f'{head.name}_accuracy']:.2%}" for head in HEADS)
        say(f"accuracy over {totals.counts['labelled']:,} labelled rows: {accuracies}")
        for name, metrics in (probability_metrics(totals) or {}).items():
            say(
                f"  {name} probabilities: negative log-likelihood {metrics['nll']:.4f} nats, Brier score {metrics['brier']:.4f}, "
                f"expected calibration error {metrics['ece']:.4f}"
            )
    say(f"predictions: {line['output']}/{PREDICTIONS}")
    say(f"report: {line['output']}/{REPORT}")


def probability_metrics(totals: Totals) -> dict[str, dict[str, Any]] | None:
    """Return by head `nll`, `brier`, `ece`, and the `reliability` that they follow from; None if no label is known."""
    if not totals.counts.get("labelled"):
        return None
    return {head: sums.as_json() for head, sums in totals.reliability.items()}
