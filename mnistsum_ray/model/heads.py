"""The heads of the network and what each predicts: columns, metrics, pictures and reports follow from this table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.images import DIGITS
from mnistsum_ray.data.order import NUMBERS, integer_type

NETWORK: Final = "TwoHeadCNN"
"""Name of the class in `model/network.py` that is trained and scored with; model.json has it too."""


@dataclass(frozen=True)
class Head:
    """One output of the network: a classification of an image and a number."""

    name: str
    """Names its columns, metrics and attributes of results: `pred_<name>`, `<name>_prob`, `<name>_accuracy`."""
    classes: int
    target: Callable[[Any, Any], Any]
    """True classes of digits and numbers, arrays or tensors that can be broadcast, by operators alone; it may give bools."""
    type: pa.DataType = field(init=False)
    """Type of its predicted classes: bool where `target` was given with bools, else the smallest integers that hold all."""

    def __post_init__(self) -> None:
        target = self.target
        given = np.asarray(target(*np.indices((DIGITS, NUMBERS))))
        if given.dtype.kind not in "bi" or not 0 <= given.min() <= given.max() < self.classes:
            text = f"its target gives {given.dtype} in {given.min()}..{given.max()}, not integers in 0..{self.classes - 1}"
            raise ValueError(f"head {self.name!r}: {text}")
        object.__setattr__(self, "type", pa.type_for_alias(integer_type(self.classes)))
        if given.dtype.kind == "b":
            object.__setattr__(self, "type", pa.bool_())
            object.__setattr__(self, "target", lambda digits, numbers: 1 * target(digits, numbers))  # losses take integers


DIGIT: Final = Head("digit", DIGITS, lambda digits, numbers: digits)
SUM: Final = Head("sum", DIGITS + NUMBERS - 1, lambda digits, numbers: digits + numbers)

HEADS: Final = (DIGIT, SUM)
"""All heads, in the order of the network's outputs."""

PREDICTION_FIELDS: Final = pa.schema(
    [field for head in HEADS for field in ((f"pred_{head.name}", head.type), (f"{head.name}_prob", pa.float32()))]
    + [("consistent", pa.bool_())]  # pred_sum == pred_digit + number
)
"""Columns that scoring adds to the input's, in their order. An output whose files have other columns is not resumed, see
`scoring.preflight.Plan.spec`."""

PROBABILITY_FIELDS: Final = pa.schema([(f"{head.name}_probs", pa.list_(pa.float32(), head.classes)) for head in HEADS])
"""Columns after these, where the probabilities of all classes are asked for."""


class HeadFields:
    """Base of dataclasses with a field for each of `names` and each head, by whose name {} is replaced. What a subclass does
    not declare itself, for editors and type checkers, comes last."""

    def __init_subclass__(cls, names: Sequence[str]) -> None:
        for added in (name.format(head.name) for head in HEADS for name in names):
            if added not in cls.__annotations__:
                cls.__annotations__[added] = Any
                shown = added not in PROBABILITY_FIELDS.names  # arrays
                setattr(cls, added, field(default=None, repr=shown, compare=shown))
