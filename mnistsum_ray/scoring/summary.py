"""What a person reads of a scoring run."""

from collections.abc import Callable
from typing import Any, Final

from mnistsum_ray.scoring.layout import FILES_TABLE, PROBABILITIES, REJECTS, RELIABILITY
from mnistsum_ray.scoring.reconcile import Totals
from mnistsum_ray.storage.location import Location

_FILES_NAMED: Final = 1000
_REASONS_NAMED: Final = 10

Say = Callable[[str], None]


def name_failures(failures: dict[str, str], say: Say) -> None:
    """One line for each file that cannot be used, with the reason."""
    for name, reason in list(failures.items())[:_FILES_NAMED]:
        say(f"cannot be used: {name}: {reason}")
    if len(failures) > _FILES_NAMED:
        say(f"and {len(failures) - _FILES_NAMED:,} more files, all in {FILES_TABLE}")


def summarize(line: dict[str, Any], totals: Totals, say: Say) -> None:
    """What came of all rows: counts, rejects by reason, share of consistent answers, accuracy where labels are there."""
    say(
        f"{line['scored_rows']:,} of {line['input_rows']:,} rows scored, {line['rejected_rows']:,} rejected, in "
        f"{line['files'] - line['failed_files']:,} files; {line['failed_files']:,} files could not be used; all accounted for"
    )
    reasons = list(totals.reasons.items())
    for reason, count in reasons[:_REASONS_NAMED]:
        say(f"  rejected: {count:,} x {reason}")
    if len(reasons) > _REASONS_NAMED:
        say(f"  rejected: {sum(count for _, count in reasons[_REASONS_NAMED:]):,} x other reasons")
    if line["scored_rows"]:
        say(f"consistent (sum = digit + number): {totals.counts['consistent'] / line['scored_rows']:.2%} of the scored rows")
    if line.get("digit_accuracy") is not None:
        say(
            f"accuracy over {totals.counts['labelled']:,} labelled rows: digit {line['digit_accuracy']:.2%}, "
            f"sum {line['sum_accuracy']:.2%}"
        )
        for head, of in (probability_metrics(totals) or {}).items():
            say(
                f"  {head} probabilities: negative log-likelihood {of['nll']:.4f} nats, Brier score {of['brier']:.4f}, expected "
                f"calibration error {of['ece']:.4f}"
            )
    say(f"predictions: {line['output']}")


def probability_metrics(totals: Totals) -> dict[str, dict[str, Any]] | None:
    """By head `nll`, `brier`, `ece` and the `reliability` they come from; None where no label is known."""
    if not totals.counts.get("labelled"):
        return None
    return {head: of.metrics() | {"reliability": of.as_json()} for head, of in totals.reliability.items()}


def draw(totals: Totals, output: Location) -> None:
    """How sure the answers are; where there are labels, how often they are right; where there are rejected rows, why."""
    from mnistsum_ray.reporting import pictures  # a second to import, needed once

    (output / PROBABILITIES).write_bytes(pictures.draw_probabilities(**totals.probabilities))
    drawn = {
        REJECTS: pictures.draw_rejects(totals.reasons) if totals.reasons else None,
        RELIABILITY: pictures.draw_reliability(totals.reliability) if totals.counts.get("labelled") else None,
    }
    for name, png in drawn.items():
        if png:
            (output / name).write_bytes(png)
        else:
            (output / name).delete()  # of an earlier run that had some
