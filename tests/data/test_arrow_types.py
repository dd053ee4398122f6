"""Each type of Arrow against each kind of column: the right value, a reason, or one line."""

import datetime as dt
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mnistsum_ray import Classes, Column, Images, Integers, Numbers, Photos, Tokens

COLUMNS: list[Column] = [
    Integers(10),
    Numbers(),
    Numbers(missing=7.0),
    Numbers(2),
    Numbers(2, missing=7.0),
    Classes(["a", "3"]),
    Tokens(10, 3),
    Images(2, 2),
    Photos(2),
]

WHOLE = [3, 0, 12, None]
FRACTIONS = [3, 0.5, 9.0, None]
DECIMALS = [Decimal(3), Decimal("0.5"), Decimal(12), None]
TEXTS = ["a", "3", "7.0", None]
RAW = [b"abcd", b"a", b"\x00\x01\x02\x03", None]
LISTS = [[3, 0], [1, 2, 3], [], [5, 12], [1, 2, 3, 4], None]
PAIRS = [[3, 0], [1, 12], None]
DAY = dt.datetime(2020, 1, 1)

VALUES: list[tuple[pa.DataType, list[Any]]] = [
    (pa.null(), [None, None]),
    (pa.bool_(), [True, False, None]),
    *((kind(), WHOLE) for kind in (pa.int8, pa.int16, pa.int32, pa.int64)),
    *((kind(), WHOLE) for kind in (pa.uint8, pa.uint16, pa.uint32, pa.uint64)),
    (pa.float16(), [np.float16(value) for value in (3, 0.5, 9)] + [None]),
    *((kind(), [*FRACTIONS, float("nan"), float("inf")]) for kind in (pa.float32, pa.float64)),
    *((kind(4, 1), DECIMALS) for kind in (pa.decimal32, pa.decimal64)),
    *((kind(4, 1), DECIMALS) for kind in (pa.decimal128, pa.decimal256)),
    *((kind(), TEXTS) for kind in (pa.string, pa.large_string, pa.string_view)),
    *((kind(), RAW) for kind in (pa.binary, pa.large_binary, pa.binary_view)),
    (pa.binary(4), [RAW[0], RAW[2], None]),
    *((kind, [DAY.date(), None]) for kind in (pa.date32(), pa.date64())),
    *((kind, [DAY, None]) for kind in (pa.timestamp("us"), pa.timestamp("ms", "UTC"))),
    *((kind, [DAY.time(), None]) for kind in (pa.time32("s"), pa.time64("us"))),
    (pa.duration("s"), [dt.timedelta(1), None]),
    (pa.month_day_nano_interval(), [(1, 2, 3), None]),
    *((kind(pa.int32()), LISTS) for kind in (pa.list_, pa.large_list)),
    *((kind(pa.int32()), LISTS) for kind in (pa.list_view, pa.large_list_view)),
    (pa.list_(pa.int8(), 2), PAIRS),
    (pa.list_(pa.float32()), [[3, 0.5], [float("nan"), 1], [None, 1], None]),
    (pa.list_(pa.bool_()), [[True, False], None]),
    (pa.list_(pa.decimal128(4, 1)), [[Decimal(1), Decimal("0.5")], None]),
    (pa.list_(pa.null()), [[None, None], [], None]),
    (pa.list_(pa.string()), [["a", "3"], None]),
    (pa.list_(pa.list_(pa.int8())), [[[1, 2], [3, 0]], [[1]], None]),
    (pa.struct({"a": pa.int8()}), [{"a": 1}, None]),
    (pa.struct({"bytes": pa.binary(), "path": pa.string()}), [{"bytes": b"abcd"}, None]),
    (pa.map_(pa.string(), pa.int8()), [[("a", 1)], None]),
]


def expected_of(column: Column, value: Any) -> Any:
    """What a value means to a kind of column, said by Python alone; None where it is rejected."""
    if isinstance(column, Integers):
        if isinstance(value, str):
            value = float(value) if re.fullmatch(r"\d+(\.0*)?", value) else None
        is_right = value is not None and np.isfinite(float(value)) and 0 <= value < column.below
        return int(value) if is_right and value == int(value) else None
    if isinstance(column, Classes):
        return column.classes.index(value) if value in column.classes else None
    if isinstance(column, Numbers):
        if column.length is None:
            return number_of(value, column.missing)
        numbers = [number_of(one, column.missing) for one in value or []]
        return None if len(numbers) != column.length or None in numbers else numbers
    if isinstance(column, Tokens):
        is_short = value is not None and len(value) <= column.length
        if not is_short or any(one is None or not 0 <= one < column.below for one in value):
            return None
        return [*value, *[-1] * (column.length - len(value))]
    if isinstance(value, dict):
        value = value["bytes"]
    if isinstance(column, Photos) or value is None:
        return None  # none of the values is a PNG or JPEG
    flat = np.array([*value] if isinstance(value, bytes) else value, object).ravel()
    flat = np.concatenate([np.ravel(one) for one in flat]) if len(flat) else flat
    return flat.reshape(2, 2).tolist() if len(flat) == 4 else None


def number_of(value: Any, missing: float | None) -> float | None:
    if value is None or np.isnan(float(value)):
        return missing
    return float(np.float32(value)) if np.isfinite(float(value)) else None


def layouts_of(kind: pa.DataType, values: list[Any]) -> list[Any]:
    """The same values as a slice, in chunks, and as categories where Arrow can."""
    column = pa.array([values[0], *values], kind).slice(1)
    layouts = [column, pa.chunked_array([column.slice(0, 1), column.slice(1)])]
    with suppress(pa.ArrowNotImplementedError):  # of nested types and some others
        layouts.append(column.dictionary_encode())
    return layouts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column}")
@pytest.mark.parametrize(("kind", "values"), VALUES, ids=lambda value: f"{value}"[:40])
def test_a_value_is_decoded_right_or_has_a_reason(
    column: Column, kind: pa.DataType, values: list[Any]
) -> None:
    problem = column.type_error(kind)
    if problem is not None:
        assert problem.startswith(f"has type {kind}, which holds no ")
        return
    expected = [expected_of(column, value) for value in values]
    zeros = column.zeros(1)[0]
    for layout in layouts_of(kind, values):
        assert column.type_error(layout.type) is None
        found, reasons = column.decode(layout, "x")
        assert [*reasons] == [row for row, value in enumerate(expected) if value is None]
        for row, value in enumerate(expected):
            assert np.array_equal(found[row], zeros if value is None else value), (row, layout)
        nothing, none = column.decode(layout.slice(0, 0), "x")
        assert (len(nothing), none) == (0, {})
