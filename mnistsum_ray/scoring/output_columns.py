"""The columns that scoring adds to the input's columns; `writer.py` fills them."""

from typing import Final

import pyarrow as pa

PREDICTION_FIELDS: Final = pa.schema(
    {
        "pred_digit": pa.int8(),
        "digit_prob": pa.float32(),
        "pred_sum": pa.int8(),
        "sum_prob": pa.float32(),
        "consistent": pa.bool_(),  # pred_sum == pred_digit + number
    }
)
"""In the order of the file. An output whose files have other columns is not resumed, see `PredictionSpec`."""
