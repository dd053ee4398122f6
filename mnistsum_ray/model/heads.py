"""The heads of the network: columns, metrics, pictures and reports follow from this table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.randomness import NUMBERS, integer_type


@dataclass(frozen=True)
class Head:
    """One output of the network: a classification of an image and a number."""

    name: str
    """As in `pred_<name>`, `<name>_prob`, `<name>_accuracy`."""
    classes: int
    target: Callable[[Any, Any], Any]
    """True class, in 0..classes-1, of digits and numbers, which are arrays or tensors."""

    @property
    def type(self) -> pa.DataType:
        """Type of its predicted classes: the smallest integers that hold all."""
        return pa.type_for_alias(integer_type(self.classes))


DIGIT: Final = Head("digit", DIGITS, lambda digits, numbers: digits)
SUM: Final = Head("sum", DIGITS + NUMBERS - 1, lambda digits, numbers: digits + numbers)

HEADS: Final = (DIGIT, SUM)
"""All heads, in the order of the network's outputs."""


def prediction_fields(heads: Sequence[Head]) -> pa.Schema:
    """Columns that scoring adds to the input's, in their order."""
    fields = []
    for head in heads:
        fields += [(f"pred_{head.name}", head.type), (f"{head.name}_prob", pa.float32())]
    return pa.schema([*fields, ("consistent", pa.bool_())])  # pred_sum == pred_digit + number


def probability_fields(heads: Sequence[Head]) -> pa.Schema:
    """Columns after these, where the probabilities of all classes are asked for."""
    # Lists of any length: pyarrow 25 cannot read a null among lists of a fixed one from Parquet.
    return pa.schema([(f"{head.name}_probs", pa.list_(pa.float32())) for head in heads])


PREDICTION_FIELDS: Final = prediction_fields(HEADS)
PROBABILITY_FIELDS: Final = probability_fields(HEADS)


def added_column(names: Sequence[str], probabilities: bool) -> str | None:
    """The first of a table's columns that has the name of one which is added; None: there is none.

    Upper and lower case are one: DuckDB and Spark do not tell them apart.
    """
    added = [*PREDICTION_FIELDS.names, "reason"]
    if probabilities:
        added += PROBABILITY_FIELDS.names
    return next((name for name in names if name.lower() in added), None)
