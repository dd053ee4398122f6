"""Predictions for the rows of an Arrow table, in this process."""

from typing import Final

import numpy as np
import pyarrow as pa

from mnistsum_ray.data.column_types import image_type_error, number_type_error
from mnistsum_ray.data.decoding import decode_images, decode_numbers, join_reasons
from mnistsum_ray.data.parquet_types import plain_table
from mnistsum_ray.data.pixels import one_chunk
from mnistsum_ray.model.inference import predict_pairs
from mnistsum_ray.model.network import TwoHeadCNN
from mnistsum_ray.model.predictions import PREDICTION_FIELDS

_REASON: Final = "reason"


def predict_table(model: TwoHeadCNN, table: pa.Table, image: str, number: str, batch_size: int) -> pa.Table:
    """Append PREDICTION_FIELDS and `reason` to a table.

    Args:
        model: in evaluation mode.
        table: any rows; none are left out.
        image: column of the images, in any form that scoring takes.
        number: column of the numbers.
        batch_size: rows in one forward pass.

    Returns:
        The rows in their order. Where one cannot be scored, the predictions are null and `reason` says why; elsewhere it is null.

    Raises:
        ValueError: a column is missing, has a type that cannot be read, or has the name of one that is added.
    """
    rows = plain_table(table)
    for name, type_error in ((image, image_type_error), (number, number_type_error)):
        if rows.column_names.count(name) != 1:
            raise ValueError(f"there must be one column {name!r}; there are {', '.join(map(repr, rows.column_names))}")
        error = type_error(rows.schema.field(name).type)
        if error:
            raise ValueError(f"column {name!r} {error}")
    taken = {*PREDICTION_FIELDS.names, _REASON} & {*rows.column_names}
    if taken:
        raise ValueError(f"column {min(taken)!r} would be added; rename it")
    images, bad_images = decode_images(one_chunk(rows[image]))
    numbers, bad_numbers = decode_numbers(one_chunk(rows[number]))
    bad_rows = join_reasons(bad_images, bad_numbers)
    reasons = [bad_rows.get(row) for row in range(len(numbers))]
    predictions = predict_pairs(model, images, numbers, batch_size)
    bad = np.array([reason is not None for reason in reasons], bool)
    for field, values in zip(PREDICTION_FIELDS, predictions.columns(numbers), strict=True):
        table = table.append_column(field, pa.array(values, field.type, mask=bad))
    return table.append_column(_REASON, pa.array(reasons, pa.string()))
