"""Counts of rows for the report: of a part, as JSON in the metadata of its files, or of many parts."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from mnistsum_ray.data.images import DIGITS, Pixels, ReasonCounts
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.metrics import Reliability

_UNSURE: Final = 20
"""Least sure rows that are shown. Some may be missing where a part has more of them than it names."""


def encode_image(image: Pixels) -> str:
    """One image, uint8[28, 28], as base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@dataclass
class RowCounts(ReasonCounts):
    """Counts over rows, the rejected ones by reason."""

    consistent: int = 0
    """Scored rows whose predicted sum is the predicted digit + number."""
    reliability: dict[str, Reliability] = field(default_factory=lambda: {head.name: Reliability() for head in HEADS})
    """By head, over the rows whose label is known."""
    confusion: list[list[int]] = field(default_factory=lambda: [[0] * DIGITS for _ in range(DIGITS)])
    """Scored rows whose label is known, by label and predicted digit."""
    bad_labels: ReasonCounts = field(default_factory=ReasonCounts)
    """Scored rows whose label is no digit, and counts as unknown. A null is unknown, and is not counted here."""
    odd_years: int = 0
    """INT96 timestamps, of rejected rows too, that are null since their year does not fit."""
    unsure: list[list[Any]] = field(default_factory=list)
    """Rows whose digit is least sure, each of another image: `digit_prob`, input file, row, predicted
    digit, number, label or None, and `encode_image`. The image is here because the input may be gone
    when the report is written."""

    @classmethod
    def sum(cls, texts: Iterable[str]) -> "RowCounts":
        """Add up counts in JSON."""
        total = cls()
        for text in texts:
            total.add(_JSON.validate_json(text))
        return total

    def as_json(self) -> str:
        return _JSON.dump_json(self).decode()

    def add(self, other: "RowCounts") -> None:
        """Add the counts of other rows, in place."""
        self.consistent += other.consistent
        self.odd_years += other.odd_years
        self.confusion = np.add(self.confusion, other.confusion).tolist()
        for head, sums in other.reliability.items():
            self.reliability[head].add(sums)
        self.add_reasons(other)
        self.bad_labels.add_reasons(other.bad_labels)
        # The last row of each image counts, which is the least sure one.
        once = {row[-1]: row for row in sorted(self.unsure + other.unsure, reverse=True)}
        self.unsure = sorted(once.values())[:_UNSURE]

    @property
    def labelled(self) -> int:
        """Number of scored rows whose label is known."""
        return sum(self.reliability[HEADS[0].name].rows)

    def accuracies(self) -> dict[str, float | None]:
        """Share of the labelled rows that each head predicts right, as `<head>_accuracy`; None without labelled rows."""
        known = self.labelled
        return {f"{head}_accuracy": sum(sums.right) / known if known else None for head, sums in self.reliability.items()}

    def probability_metrics(self) -> dict[str, dict[str, Any]] | None:
        """By head `ece` and the `reliability` that it follows from; None if no label is known."""
        return {head: sums.as_json() for head, sums in self.reliability.items()} if self.labelled else None


_JSON: Final = TypeAdapter(RowCounts)
