"""The heads of the network and what each predicts: columns, metrics, pictures and reports follow from this table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.order import NUMBERS


@dataclass(frozen=True)
class Head:
    """One output of the network: a classification of an image and a number."""

    name: str
    """Names its columns and metrics: `pred_<name>`, `<name>_prob`, `<name>_accuracy`."""
    classes: int
    target: Callable[[Any, Any], Any]
    """True classes of digits and numbers: integers, arrays or tensors that can be broadcast."""


DIGIT: Final = Head("digit", DIGITS, lambda digits, numbers: digits)
SUM: Final = Head("sum", DIGITS + NUMBERS - 1, lambda digits, numbers: digits + numbers)

HEADS: Final = (DIGIT, SUM)
"""All heads, in the order of the network's outputs."""

PREDICTION_FIELDS: Final = pa.schema(
    [field for head in HEADS for field in ((f"pred_{head.name}", pa.int8()), (f"{head.name}_prob", pa.float32()))]
    + [("consistent", pa.bool_())]  # pred_sum == pred_digit + number
)
"""Columns that scoring adds to the input's, in their order. An output whose files have other columns is not resumed, see
`scoring.preflight.Plan.spec`."""

PROBABILITY_FIELDS: Final = pa.schema([(f"{head.name}_probs", pa.list_(pa.float32(), head.classes)) for head in HEADS])
"""Columns after these, where the probabilities of all classes are asked for."""
