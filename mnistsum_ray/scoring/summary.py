"""What a person reads of a scoring run."""

from collections.abc import Callable
from typing import Any, Final

from mnistsum_ray.scoring.plan import FILES, PROBABILITIES, REJECTS
from mnistsum_ray.scoring.reconcile import Totals
from mnistsum_ray.storage import Location

_FILES_NAMED: Final = 1000
_REASONS_NAMED: Final = 10

Say = Callable[[str], None]


def name_failures(failures: dict[str, str], say: Say) -> None:
    """One line for each file that cannot be used, with the reason."""
    for name, reason in list(failures.items())[:_FILES_NAMED]:
        say(f"cannot be used: {name}: {reason}")
    if len(failures) > _FILES_NAMED:
        say(f"and {len(failures) - _FILES_NAMED:,} more files, all in {FILES}")


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
    say(f"predictions: {line['output']}")


def draw(totals: Totals, output: Location) -> None:
    """How sure the answers are, and where there are rejected rows, why."""
    from mnistsum_ray import pictures  # a second to import, needed once

    (output / PROBABILITIES).write_bytes(pictures.draw_probabilities(**totals.probabilities))
    if totals.reasons:
        (output / REJECTS).write_bytes(pictures.draw_rejects(totals.reasons))
    else:
        (output / REJECTS).delete()  # of an earlier run that had some
