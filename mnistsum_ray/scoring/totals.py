"""Counts over rows: of one part, when it is written, and their sums over a whole run."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.model.calibration import HEADS
from mnistsum_ray.model.predictions import Predictions
from mnistsum_ray.model.reliability import Reliability
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
        "consistent": int((predictions.sum == predictions.digit + part.numbers).sum()),
        "digit_prob": _histogram(predictions.digit_prob),
        "sum_prob": _histogram(predictions.sum_prob),
        "digits": np.bincount(predictions.digit, minlength=10).tolist(),
        "numbers": np.bincount(part.numbers, minlength=10).tolist(),
        "unsure": _least_sure(part, predictions),
    }
    if part.labels is not None:
        labelled = part.labels >= 0
        counts["labelled"] = int(labelled.sum())
        counts["digits_right"] = int((predictions.digit == part.labels)[labelled].sum())
        counts["sums_right"] = int((predictions.sum == part.labels + part.numbers)[labelled].sum())
        counts["reliability"] = _reliability(part, part.labels, predictions)
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


def _histogram(probabilities: npt.NDArray[np.float32]) -> list[int]:
    counts: list[int] = np.histogram(probabilities, PROBABILITY_BINS, (0, 1))[0].tolist()
    return counts


def _reliability(part: DecodedPart, labels: npt.NDArray[np.int64], predictions: Predictions) -> dict[str, Any]:
    """`Reliability` by head, over the rows whose label is known."""
    losses = predictions.losses
    assert losses is not None, "the predictor was given the labels"
    labelled = labels >= 0
    digits_right, sums_right = predictions.digit == labels, predictions.sum == labels + part.numbers
    digit = Reliability.from_predictions(
        predictions.digit_prob[labelled], digits_right[labelled], losses.digit_nll[labelled], losses.digit_brier[labelled]
    )
    sum_ = Reliability.from_predictions(
        predictions.sum_prob[labelled], sums_right[labelled], losses.sum_nll[labelled], losses.sum_brier[labelled]
    )
    return {"digit": digit.as_json(), "sum": sum_.as_json()}


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
    histograms = {name: np.zeros(PROBABILITY_BINS, np.int64) for name in ("digit_prob", "sum_prob")}
    frequencies = {name: np.zeros(10, np.int64) for name in ("digits", "numbers")}
    reliability = {head: Reliability() for head in HEADS}
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
                reliability[head].add(Reliability.from_json(sums))
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
