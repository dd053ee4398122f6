"""TODO scoring.layout"""

from typing import Final

import pyarrow as pa

from mnistsum_ray.storage.lock_record import LOCK_NAME

PREDICTION_FIELDS: Final = pa.schema(
    {
        "pred_digit": pa.int8(),
        "digit_prob": pa.float32(),
        "pred_sum": pa.int8(),
        "sum_prob": pa.float32(),
        "consistent": pa.bool_(),
    }
)
"""The columns that scoring adds."""

REJECTED: Final = "_rejected"
FILES_TABLE: Final = "_files.parquet"
MANIFEST: Final = "_manifest.json"
PROBABILITIES: Final = "_probabilities.png"
REJECTS: Final = "_rejects.png"
RELIABILITY: Final = "_reliability.png"
UNPUBLISHED: Final = "_unpublished"

SUMMARIES: Final = (FILES_TABLE, PROBABILITIES, REJECTS, RELIABILITY)
"""What is written of the whole at the end, before the manifest."""

_OWN: Final = (REJECTED, *SUMMARIES, MANIFEST, LOCK_NAME, UNPUBLISHED)

MOST_NAME_BYTES: Final = 255


def is_reserved(output: str) -> bool:
    """Whether an output of this name would not be seen as one."""
    name = output.rpartition("/")[2]
    return output.split("/")[0] in _OWN or name.startswith(".")
