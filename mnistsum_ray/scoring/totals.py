"""Counts over rows: of one part, when it is written, and their sums over a whole run."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.model.heads import DIGITS, HEADS
from mnistsum_ray.model.inference import Predictions
from mnistsum_ray.model.metrics import Reliability
from mnistsum_ray.scoring.reader import DecodedPart

PROBABILITY_BINS: Final = 20
"""Bins of equal width over 0..1, in which rows are counted by `digit_prob` and by `sum_prob`."""

OTHER_REASONS: Final = "other reasons"

_PARTS_AT_ONCE: Final = 10_000
"""Parts whose counts are Python objects at the same time."""

_UNSURE_PER_PART: Final = 3
_UNSURE: Final = 20
"""The least sure rows of a part, and of a run, that are listed. A run may miss some where a part has more of them."""

_EXAMPLES: Final = 3
"""Rows that are named for each reason."""

_MAX_REASONS: Final = 20
"""Reasons that a file's metadata counts separately, so that a file with many different bad rows stays small."""


def count_part(part: DecodedPart, predictions: Predictions) -> dict[str, Any]:
    """Count the rows of a part; the values are JSON, and `Totals` adds them up over the parts of a run."""
    counts: dict[str, Any] = {
        "consistent": int(predictions.columns(part.numbers)[-1].sum()),
        "digits": np.bincount(predictions.digit, minlength=DIGITS).tolist(),
        "numbers": np.bincount(part.numbers, minlength=NUMBERS).tolist(),
        "unsure": _least_sure(part, predictions),
    }
    for head in HEADS:
        counts[f"{head.name}_prob"] = np.histogram(predictions.values[f"{head.name}_prob"], PROBABILITY_BINS, (0, 1))[0].tolist()
    if part.labels is not None:
        labelled = part.labels >= 0
        counts["labelled"] = int(labelled.sum())
        counts["reliability"] = {}
        for head in HEADS:
            answer, probability, nll, brier = (
                predictions.values[name.format(head.name)][labelled] for name in ("pred_{}", "{}_prob", "{}_nll", "{}_brier")
            )
            right = answer == head.target(part.labels, part.numbers)[labelled]
            counts[f"{head.name}s_right"] = int(right.sum())
            counts["reliability"][head.name] = vars(Reliability.from_predictions(probability, right, nll, brier))
    if part.reasons:
        commonest = Counter(part.reasons.values()).most_common(_MAX_REASONS)
        others = len(part.reasons) - sum(count for _, count in commonest)
        counts["reasons"] = dict(commonest) | ({OTHER_REASONS: others} if others else {})
        first_rows = {reason: row for row, reason in reversed(part.reasons.items())}
        counts["examples"] = {reason: part.part.first_row + first_rows[reason] for reason, _ in commonest}
    return counts


def _least_sure(part: DecodedPart, predictions: Predictions) -> list[list[float | int]]:
    """`digit_prob`, row in the input file, predicted digit and number of the rows whose digit is least sure."""
    good = np.setdiff1d(np.arange(part.part.rows), np.fromiter(part.reasons, np.int64, len(part.reasons)))
    places = np.argsort(predictions.digit_prob, kind="stable")[:_UNSURE_PER_PART]
    return [
        [
            round(float(predictions.digit_prob[place]), 3),
            part.part.first_row + int(good[place]),
            int(predictions.digit[place]),
            int(part.numbers[place]),
        ]
        for place in places
    ]


@dataclass(frozen=True)
class Totals:
    """Counts over all rows of a run, earlier committed rows included."""

    input_rows: int
    scored_rows: int
    rejected_rows: int
    counts: dict[str, int]
    """`consistent`, and with a label column `labelled`, `digits_right` and `sums_right`."""
    reasons: dict[str, int]
    """Rejected rows by reason, the commonest first."""
    probabilities: dict[str, list[int]]
    """Scored rows by `digit_prob` and by `sum_prob`, in PROBABILITY_BINS bins."""
    reliability: dict[str, Reliability]
    """By head, over the rows whose label is known."""
    examples: dict[str, list[tuple[str, int]]]
    """Some rejected rows by reason: input file and row."""
    digits: list[int]
    """Scored rows by predicted digit."""
    numbers: list[int]
    """Scored rows by number."""
    unsure: list[tuple[float, str, int, int, int]]
    """Rows whose digit is least sure: `digit_prob`, input file, row, predicted digit, number."""


def add_up(files: pa.Table, names: pa.ChunkedArray, part_counts: pa.ChunkedArray) -> Totals:
    """Add up the rows of all files and the counts of all parts.

    Args:
        files: `reconcile.FILES_SCHEMA`.
        names: the input file of each part.
        part_counts: `count_part` of each part, as JSON.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    histograms = {name: np.zeros(PROBABILITY_BINS, np.int64) for name in (f"{head.name}_prob" for head in HEADS)}
    frequencies = {"digits": np.zeros(DIGITS, np.int64), "numbers": np.zeros(NUMBERS, np.int64)}
    reliability = {head.name: Reliability() for head in HEADS}
    examples: dict[str, list[tuple[str, int]]] = {}
    unsure: list[tuple[float, str, int, int, int]] = []
    for start in range(0, len(part_counts), _PARTS_AT_ONCE):
        chunk = slice(start, start + _PARTS_AT_ONCE)
        for name, text in zip(names[chunk].to_pylist(), part_counts[chunk].to_pylist(), strict=True):
            part = json.loads(text)
            reasons.update(part.pop("reasons", {}))
            for reason, row in part.pop("examples", {}).items():
                if len(examples.setdefault(reason, [])) < _EXAMPLES:
                    examples[reason].append((name, row))
            unsure += [(probability, name, *where) for probability, *where in part.pop("unsure")]
            for key, counted in frequencies.items():
                counted += np.array(part.pop(key))
            for key, histogram in histograms.items():
                histogram += np.array(part.pop(key))
            for head, sums in part.pop("reliability", {}).items():
                reliability[head].add(Reliability(**sums))
            counts.update(part)
        unsure = sorted(unsure)[:_UNSURE]
    usable = files.filter(pc.equal(files["status"], "scored"))
    return Totals(
        input_rows=pc.sum(usable["rows"]).as_py() or 0,
        scored_rows=pc.sum(files["scored"]).as_py() or 0,
        rejected_rows=pc.sum(files["rejected"]).as_py() or 0,
        counts=dict(counts),
        reasons=dict(reasons.most_common()),
        probabilities={name: histogram.tolist() for name, histogram in histograms.items()},
        reliability=reliability,
        examples=examples,
        digits=frequencies["digits"].tolist(),
        numbers=frequencies["numbers"].tolist(),
        unsure=unsure,
    )
