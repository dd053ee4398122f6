"""TODO data.arrow_types"""

from typing import Final

import pyarrow as pa

_RAY_TYPES: Final = (
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
    "ray.data.arrow_pickled_object",
)


def plain_arrow_types() -> None:
    """Have this process read columns of Ray's own Arrow types as what they are stored as.

    So they are written again as plain types, for readers without Ray, and nothing of a file is ever unpickled.
    """
    for name in _RAY_TYPES:
        try:
            pa.unregister_extension_type(name)
        except pa.ArrowKeyError:  # not registered, or no longer
            continue
