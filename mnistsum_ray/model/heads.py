"""The heads of the network, from which metrics, pictures and reports follow; and its columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.randomness import NUMBERS


@dataclass(frozen=True)
class Head:
    """One output of the network: a classification of an image and a number."""

    name: str  # as in `pred_<name>`, `<name>_prob`, `<name>_accuracy`
    classes: int
    target: Callable[[Any, Any], Any]  # from digits and numbers to true classes, arrays or tensors


DIGIT: Final = Head("digit", DIGITS, lambda digits, numbers: digits)
SUM: Final = Head("sum", DIGITS + NUMBERS - 1, lambda digits, numbers: digits + numbers)

HEADS: Final = (DIGIT, SUM)
"""All heads, in the order of the network's outputs."""

PREDICTION_FIELDS: Final = pa.schema(
    {
        "pred_digit": pa.int8(),
        "digit_prob": pa.float32(),
        "pred_sum": pa.int8(),
        "sum_prob": pa.float32(),
        "consistent": pa.bool_(),  # pred_sum == pred_digit + number
    }
)
"""The columns that scoring adds first to the input's; `reason` is the last."""

# Lists of any length: pyarrow 25 cannot read from Parquet a null among lists of a fixed one.
_PROBABILITIES: Final = pa.list_(pa.float32())

PROBABILITY_FIELDS: Final = pa.schema({f"{head.name}_probs": _PROBABILITIES for head in HEADS})
"""The columns between, where the probabilities of all classes are asked for."""


def clashing_column(names: Sequence[str], probabilities: bool) -> str | None:
    """The first of a table's columns whose name an added one would have too; None: there is none.

    Upper and lower case are one: DuckDB and Spark do not tell them apart.
    """
    added = [*PREDICTION_FIELDS.names, "reason"]
    if probabilities:
        added += PROBABILITY_FIELDS.names
    return next((name for name in names if name.lower() in added), None)
