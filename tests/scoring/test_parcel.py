"""A parcel brings the model its rows, and the writer the parts and their predictions."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mnistsum_ray.model.calibration import Temperatures
from mnistsum_ray.model.predictions import Predictions
from mnistsum_ray.scoring.decode import DecodedPart, UnreadablePart
from mnistsum_ray.scoring.parcel import pack_parts, rows_of, unpack_predictions, with_predictions
from mnistsum_ray.scoring.parts import Part

RANDOM = np.random.default_rng(0)


def part(name: str, rows: int) -> Part:
    return Part(name, 1, 2, "sha", name, first_row=0, rows=rows, first_group=0, num_groups=1, skip_rows=0)


def decoded(name: str, rows: int, *, labels: bool) -> DecodedPart:
    images = RANDOM.integers(0, 256, (rows, 28, 28), np.uint8)
    numbers = RANDOM.integers(0, 10, rows)
    table = pa.table({"id": np.arange(1000)}).slice(100, rows)
    return DecodedPart(part(name, rows), table, images, numbers, RANDOM.integers(-1, 10, rows) if labels else None, table[:0], {})


def predict(numbers: np.ndarray, labels: np.ndarray | None) -> Predictions:
    digit_scores, sum_scores = torch.randn(len(numbers), 10), torch.randn(len(numbers), 19)
    return Predictions.from_scores(digit_scores, sum_scores, Temperatures(), numbers, labels)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("sizes", [(7,), (7, 0, 5), (0,)])
def test_rows_go_to_the_model_and_predictions_to_the_writer(sizes: tuple[int, ...], labels: bool) -> None:
    parts = [decoded(f"{index}.parquet", rows, labels=labels) for index, rows in enumerate(sizes)]
    parcel = pack_parts(12.5, [parts[0], UnreadablePart(part("bad.parquet", 3), "damaged"), *parts[1:]])
    assert parcel.num_rows == 1
    rows = rows_of(parcel)
    assert np.array_equal(rows.images, np.concatenate([one.images for one in parts]))
    assert np.array_equal(rows.numbers, np.concatenate([one.numbers for one in parts]))
    assert (rows.labels is not None) == labels
    predictions = predict(rows.numbers, rows.labels)
    predicted = with_predictions(parcel, 13.0, predictions)
    assert "images" not in predicted.column_names
    started, (first, bad, *others), unpacked = unpack_predictions(predicted)
    assert started == 13.0, "the model was ready later than the reader"
    assert isinstance(bad, UnreadablePart)
    assert bad.reason == "damaged"
    for before, after in zip(parts, [first, *others], strict=True):
        assert isinstance(after, DecodedPart)
        assert (after.part, len(after.images)) == (before.part, 0)
        assert after.passthrough.equals(before.passthrough)
        assert np.array_equal(after.numbers, before.numbers)
    for name, values in vars(predictions).items():
        if name != "losses":
            assert np.array_equal(getattr(unpacked, name), values)
            assert getattr(unpacked, name).dtype == values.dtype
    assert (unpacked.losses is not None) == labels
    if unpacked.losses and predictions.losses:
        assert all(np.array_equal(getattr(unpacked.losses, name), values) for name, values in vars(predictions.losses).items())


def test_a_parcel_of_unreadable_parts_has_no_rows() -> None:
    parcel = pack_parts(1.0, [UnreadablePart(part("bad.parquet", 3), "damaged")])
    rows = rows_of(parcel)
    assert (len(rows.images), len(rows.numbers), rows.labels) == (0, 0, None)
    _, parts, predictions = unpack_predictions(with_predictions(parcel, 0.0, predict(rows.numbers, rows.labels)))
    assert [type(one) for one in parts] == [UnreadablePart]
    assert len(predictions.digit) == 0


def test_parcels_that_ray_data_joins_to_a_block_are_read_one_by_one() -> None:
    """One of them has no labels, since it has no rows."""
    good = decoded("a.parquet", 5, labels=True)
    parcels = [pack_parts(1.0, [UnreadablePart(part("bad.parquet", 3), "damaged")]), pack_parts(1.0, [good])]
    block = pa.concat_tables(parcels, promote_options="default")
    rows = [rows_of(block.slice(index, 1)) for index in range(2)]
    assert [len(one.numbers) for one in rows] == [0, 5]
    assert rows[0].labels is None
    assert rows[1].labels is not None
    predicted = [with_predictions(block.slice(index, 1), 0.0, predict(one.numbers, one.labels)) for index, one in enumerate(rows)]
    block = pa.concat_tables(predicted, promote_options="default")
    assert [unpack_predictions(block.slice(index, 1))[2].losses is not None for index in range(2)] == [False, True]


def test_a_parcel_has_the_slice_of_a_table_and_not_the_rest() -> None:
    large = pa.table({"text": ["x" * 1000] * 10_000})
    whole = decoded("a.parquet", 5, labels=False)
    small = DecodedPart(whole.part, large.slice(3, 5), whole.images, whole.numbers, None, large[:0], {})
    assert len(pack_parts(0.0, [small])["parts"][0].as_py()) < 20_000
