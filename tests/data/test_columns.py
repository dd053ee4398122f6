"""Values of columns become arrays; one that cannot be used is 0, and its reason says why."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mnistsum_ray import Integers, Numbers, Photos
from mnistsum_ray.data.columns import (
    Column,
    ReasonCounts,
    decode_columns,
    name_in_file,
    rows_in,
)

COLUMN_KINDS: list[tuple[Column, list[pa.DataType], list[pa.DataType]]] = [
    (
        Integers(10),
        [pa.int8(), pa.uint64(), pa.float32(), pa.string(), pa.string_view(), pa.null()],
        [pa.bool_(), pa.binary(), pa.list_(pa.int8())],
    ),
    (
        Numbers(),
        [pa.float16(), pa.int64(), pa.decimal128(9, 2), pa.null()],
        [pa.string(), pa.bool_(), pa.list_(pa.float32())],
    ),
    (
        Numbers(3),
        [pa.list_(pa.int8()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3), pa.null()],
        [pa.float32(), pa.list_(pa.string()), pa.list_(pa.list_(pa.float32()))],
    ),
]


@pytest.mark.parametrize(("column", "right", "wrong"), COLUMN_KINDS)
def test_a_type_that_holds_no_such_values_is_known(
    column: Column, right: list[pa.DataType], wrong: list[pa.DataType]
) -> None:
    assert [kind for kind in right if column.type_error(kind)] == []
    for kind in wrong:
        said = str(column.type_error(kind))
        assert said.startswith(f"has type {kind}, which holds no "), kind


NUMBERS = [
    (pa.array([8, 0, None, 9, 10], pa.int16()).slice(1), {0: 0, 2: 9}),
    (pa.array([2**64 - 1, 2**63, 3], pa.uint64()), {2: 3}),
    (pa.array([3.0, 3.5, float("nan"), float("inf"), -0.0, None, -1.0]), {0: 3, 4: 0}),
    (pa.array(["7", "7.0", "7.5", "seven", "", None, "-1", "10", "nan", "9" * 400]), {0: 7, 1: 7}),
    (pa.array(["3", "x"]).dictionary_encode(), {0: 3}),
    (pa.array(["3"], pa.large_string()), {0: 3}),
]


@pytest.mark.parametrize(("values", "right"), NUMBERS)
def test_a_whole_number_of_any_type_is_below_its_bound_or_has_a_reason(
    values: pa.Array, right: dict[int, int]
) -> None:
    """Which quotes it in short."""
    numbers, rejected = Integers(10).decode(values, "number")
    assert numbers.dtype == np.int64
    assert sorted([*rejected, *right]) == list(range(len(values)))
    assert {row: numbers[row] for row in right} == right
    assert not numbers[list(rejected)].any()
    wrong = r"the number is (null; fill it in|.{1,310}, not one of 0\.\.9; correct it) or drop "
    assert all(re.fullmatch(f"{wrong}the row", reason) for reason in rejected.values())


LARGE = 1e39  # finite in 64 bits alone
NOT_TWO = "not 2 numbers that are finite in 32 bits; correct it or drop the row"
FLOATS: list[tuple[Numbers, pa.Array, list[Any], dict[int, str]]] = [
    (
        Numbers(),
        pa.array([0, 1.5, None, float("nan"), -float("inf"), LARGE]).slice(1),
        [1.5, 0, 0, 0, 0],
        {
            1: "the x is null; fill it in or drop the row",
            2: "the x is nan, not finite in 32 bits; correct it or drop the row",
            3: "the x is -inf, not finite in 32 bits; correct it or drop the row",
            4: "the x is 1e+39, not finite in 32 bits; correct it or drop the row",
        },
    ),
    (Numbers(), pa.array([1, 2**62], pa.int64()), [1, 2**62], {}),
    (
        Numbers(2),
        pa.array([[9, 9], [1, 2], [3], None, [4, None], [5, LARGE], [6, 7]]).slice(1),
        [[1, 2], [0, 0], [0, 0], [0, 0], [0, 0], [6, 7]],
        {
            1: f"the x is a list of 1, {NOT_TWO}",
            2: "the x is null; fill it in or drop the row",
            3: f"the x is a list of 2, {NOT_TWO}",
            4: f"the x is a list of 2, {NOT_TWO}",
        },
    ),
    (
        Numbers(2),
        pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
        [[1, 2], [0, 0], [3, 4]],
        {1: "the x is null; fill it in or drop the row"},
    ),
    (
        Numbers(2),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.eye(2, dtype=np.float32)),
        [[1, 0], [0, 1]],
        {},
    ),
    (Numbers(2), pa.nulls(1), [[0, 0]], {0: "the x is null; fill it in or drop the row"}),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("column", "values", "expected", "reasons"), FLOATS)
def test_numbers_are_finite_and_lists_have_their_length_or_have_a_reason(
    column: Numbers, values: pa.Array, expected: list[Any], reasons: dict[int, str]
) -> None:
    assert column.type_error(values.type) is None
    found, rejected = column.decode(values, "x")
    assert (found.dtype.name, found.shape) == ("float32", (len(values), *column.shape))
    assert np.array_equal(found, np.array(expected, np.float32))
    assert rejected == reasons
    assert np.array_equal(column.load(found), found)


def test_a_row_has_one_reason_whatever_it_lacks_and_names_are_found() -> None:
    columns: dict[str, Column] = {"a": Integers(3, names=("first", "second")), "b": Numbers()}
    table = pa.table({"second": [1, None, 7], "x": [0.5, float("nan"), 2.0]})
    names = {
        "a": name_in_file(columns["a"], "a", table.column_names, None),
        "b": name_in_file(columns["b"], "b", table.column_names, "x"),
    }
    assert names == {"a": "second", "b": "x"}
    assert name_in_file(columns["a"], "a", [], None) == "first"
    assert name_in_file(columns["b"], "b", [], None) == "b"
    arrays, reasons = decode_columns(columns, table, names)
    assert [values.tolist() for values in arrays.values()] == [[1, 0, 0], [0.5, 0, 2]]
    null, wrong = "the a is null; fill it in or drop the row", "the b is nan, not finite in 32 bits"
    assert reasons == {
        1: f"{null}; {wrong}; correct it or drop the row",
        2: "the a is 7, not one of 0..2; correct it or drop the row",
    }


@pytest.mark.parametrize("column", [Integers(5), Numbers(), Numbers(4), Photos(6)])
def test_zeros_and_random_rows_are_as_decoded_ones_also_from_the_object_store(
    column: Column,
) -> None:
    generator = np.random.default_rng(0)
    shape = (3, *column.shape)
    for batch in (column.load(column.zeros(3)), column.random(3, generator)):
        assert (batch.dtype, batch.shape) == (np.dtype(column.dtype), shape)
    assert not column.load(column.zeros(3)).any()
    stored = column.to_arrow(column.zeros(3))
    assert len(stored) == 3
    assert column.row_bytes * 3 == column.load(column.zeros(3)).nbytes


def test_rows_of_so_many_bytes_are_one_at_least_and_small_rows_count_as_a_kib() -> None:
    assert [rows_in(size, [Integers(3)]) for size in (1, 10 * 1024)] == [1, 10]
    assert rows_in(2**20, [Numbers(1024), Numbers(1024)]) == 128


def test_sums_of_reasons_stay_small() -> None:
    """Each part has other reasons, as with labels of another kind; the rows are counted exactly."""
    counts = ReasonCounts()
    for part in reversed(range(50)):
        rows = [(f"{part:02}", row, f"the digit is {100 * part + row}") for row in range(60)]
        counts.add(Counter(reason for *_, reason in rows), rows)
    assert len(counts.reasons) == 21
    assert counts.total == 3000
    assert counts.examples == [("00", row, f"the digit is {row}") for row in range(5)]
    assert counts.describe().startswith("00: row 0: the digit is 0 | 00: row 1: ")
    assert counts.describe().endswith(" | …")
    alike = ReasonCounts()
    alike.add(
        {"is null": 2, "is 10": 1}, [("a", 3, "is null"), ("a", 7, "is 10"), ("b", 1, "is null")]
    )
    assert alike.describe() == "a: row 3, b: row 1: is null | a: row 7: is 10"
