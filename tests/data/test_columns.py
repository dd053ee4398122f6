"""Values of columns become arrays; one that cannot be used is 0, and its reason says why."""

import decimal
import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mnistsum_ray import Classes, Images, Integers, Numbers, Photos, Tokens
from mnistsum_ray.data.columns.base import (
    Column,
    ColumnError,
    ReasonCounts,
    decode_columns,
    find_columns,
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
        [pa.float16(), pa.int64(), pa.bool_(), pa.decimal128(9, 2), pa.null()],
        [pa.string(), pa.timestamp("us"), pa.list_(pa.float32())],
    ),
    (
        Numbers(3),
        [pa.list_(pa.int8()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3), pa.null()],
        [pa.float32(), pa.list_(pa.string()), pa.list_(pa.list_(pa.float32()))],
    ),
    (
        Classes(["a", "b"]),
        [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.null()],
        [pa.int64(), pa.bool_(), pa.binary(), pa.list_(pa.string())],
    ),
    (
        Tokens(9, 3),
        [pa.list_(pa.int8()), pa.large_list(pa.uint64()), pa.list_(pa.int16(), 3), pa.null()],
        [pa.int64(), pa.string(), pa.list_(pa.float32()), pa.list_(pa.list_(pa.int8()))],
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


def test_a_whole_number_above_the_precision_of_floats_is_exact() -> None:
    large = 2**60
    whole = pa.array([large + 1, 2**63 - 1, None], pa.int64())
    for kind in (pa.int64(), pa.uint64(), pa.decimal128(38), pa.float64()):
        found, rejected = Integers(large + 2).decode(whole.cast(kind, safe=False), "id")
        expected = large if kind == pa.float64() else large + 1  # a float has no such number
        assert (found.tolist(), [*rejected]) == ([expected, 0, 0], [1, 2]), kind
    over = [decimal.Decimal(2**64 + 3), decimal.Decimal("3.5"), decimal.Decimal(3)]
    found, rejected = Integers(10).decode(pa.array(over, pa.decimal128(38, 1)), "id")
    assert (found.tolist(), [*rejected]) == ([0, 0, 3], [0, 1])


def test_a_class_is_known_by_its_name_and_a_list_of_tokens_by_its_end() -> None:
    texts = pa.array(["no", "yes", None, "Yes", "", "no"]).slice(1)
    for values in (texts, texts.dictionary_encode(), texts.cast(pa.string_view())):
        found, rejected = Classes(["no", "yes"]).decode(values, "answer")
        assert (found.dtype.name, found.tolist()) == ("int64", [1, 0, 0, 0, 0])
        wrong = "not one of no, yes; correct it or drop the row"
        assert rejected == {
            1: "the answer is null; fill it in or drop the row",
            2: f"the answer is 'Yes', {wrong}",
            3: f"the answer is '', {wrong}",
        }
    lists = [[1, 2], [], [8, 8, 8], [1, 9], [-1], [1, None], None, [1, 2, 3, 4], [2**33]]
    right = [[1, 2, -1], [-1, -1, -1], [8, 8, 8]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64())):
        found, rejected = Tokens(9, 3).decode(pa.array([[5], *lists], kind).slice(1), "text")
        assert found.tolist() == [*right, *[[0, 0, 0]] * 6]
        assert [*rejected] == [3, 4, 5, 6, 7, 8]
        assert rejected[7].startswith(
            "the text is a list of 4, not at most 3 whole numbers in 0..8"
        )


def test_a_number_that_is_missing_is_what_the_task_says() -> None:
    values = pa.array([1.5, None, float("nan"), float("inf")])
    found, rejected = Numbers(missing=-1).decode(values, "x")
    assert (found.tolist(), [*rejected]) == ([1.5, -1, -1, 0], [3])
    found, rejected = Numbers(2, missing=0.5).decode(pa.array([[None, 1], None, [2, 3]]), "x")
    assert (found.tolist(), [*rejected]) == ([[0.5, 1], [0, 0], [2, 3]], [1])
    found, rejected = Numbers().decode(pa.array([True, False, None]), "x")
    assert (found.tolist(), [*rejected]) == ([1, 0, 0], [2])


NONSENSE: list[tuple[Any, tuple[Any, ...], str]] = [
    (Integers, (0,), "Integers: below is 0, and must be an integer of at least 1"),
    (Integers, (2.5,), "Integers: below is 2.5, and must be"),
    (Numbers, (0,), "Numbers: length is 0, and must be"),
    (Numbers, (None, float("nan")), "Numbers: missing is nan, and must be finite"),
    (Classes, ([],), "Classes: must have the name of a class or more, as text"),
    (Classes, (["a", "b", "a"],), "Classes: has 'a' twice"),
    (Tokens, (10, -1), "Tokens: length is -1, and must be"),
    (Images, (28, 0), "Images: width is 0, and must be an integer in 1..16,384"),
    (Images, (28, 28, "RGBA"), "Images: mode is 'RGBA', and must be L or RGB"),
    (Photos, (-1,), "Photos: side is -1, and must be in 1..16,384"),
]


@pytest.mark.parametrize(("kind", "arguments", "said"), NONSENSE)
def test_a_column_that_makes_no_sense_is_refused(
    kind: Any, arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        kind(*arguments)


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
    names = find_columns(columns, table.schema, {"b": "x"}, "--{}-column".format)
    assert names == {"a": "second", "b": "x"}
    missing = "^has no column 'first' but x; --a-column names another$"
    with pytest.raises(ColumnError, match=missing):
        find_columns(columns, table.select(["x"]).schema, {"b": "x"}, "--{}-column".format)
    arrays, reasons = decode_columns(columns, table, names)
    assert [values.tolist() for values in arrays.values()] == [[1, 0, 0], [0.5, 0, 2]]
    null, wrong = "the a is null; fill it in or drop the row", "the b is nan, not finite in 32 bits"
    assert reasons == {
        1: f"{null}; {wrong}; correct it or drop the row",
        2: "the a is 7, not one of 0..2; correct it or drop the row",
    }


@pytest.mark.parametrize(
    "column", [Integers(5), Numbers(), Numbers(4), Classes(["a", "b"]), Tokens(9, 4), Photos(6)]
)
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
