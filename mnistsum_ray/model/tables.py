"""Predictions for columns of images and numbers, in this process."""

from typing import Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.images import decode_images, decode_numbers, image_type_error, join_reasons, number_type_error, one_chunk
from mnistsum_ray.data.parquet_types import plain_table
from mnistsum_ray.model.heads import PREDICTION_FIELDS
from mnistsum_ray.model.inference import predict_pairs
from mnistsum_ray.model.network import TwoHeadCNN

REASON: Final = "reason"


def predict_columns(model: TwoHeadCNN, columns: dict[str, pa.Array], batch_size: int) -> dict[str, pa.Array]:
    """The columns PREDICTION_FIELDS and `reason` of n rows.

    Args:
        model: in evaluation mode.
        columns: the images, in any form that scoring takes, and the numbers, n each, by the names that errors have.
        batch_size: rows in one forward pass.

    Returns:
        n values each. Where a row cannot be scored, the predictions are null and `reason` says why; elsewhere it is null.

    Raises:
        ValueError: a column has a type that cannot be read.
    """
    rows = plain_table(pa.table(columns))
    for name, type_error in zip(columns, (image_type_error, number_type_error), strict=True):
        error = type_error(rows.schema.field(name).type)
        if error:
            raise ValueError(f"column {name!r} {error}")
    images, bad_images = decode_images(one_chunk(rows.column(0)))
    numbers, bad_numbers = decode_numbers(one_chunk(rows.column(1)))
    bad_rows = join_reasons(bad_images, bad_numbers)
    reasons = [bad_rows.get(row) for row in range(len(numbers))]
    values = predict_pairs(model, images, numbers, batch_size).columns(numbers)
    bad = np.array([reason is not None for reason in reasons], bool)
    arrays = [pa.array(of_field, field.type, mask=bad) for field, of_field in zip(PREDICTION_FIELDS, values, strict=True)]
    return dict(zip(PREDICTION_FIELDS.names, arrays, strict=True)) | {REASON: pa.array(reasons, pa.string())}
