"""Python API of a model: load it, and predict a picture, arrays, or the rows of a table."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mnistsum_ray.data.images import (
    Pixels,
    decode_images,
    decode_numbers,
    image_type_error,
    join_reasons,
    number_type_error,
    one_chunk,
)
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.picture import Picture, prepare_picture
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.heads import added_column
from mnistsum_ray.storage.uri import empty_output, locate_existing, refused

if TYPE_CHECKING:  # torch takes seconds to import
    from mnistsum_ray.model.network import Network

Model: TypeAlias = "Network | str | Path"
"""A model of `load_model`, or what that takes."""


def load_model(model: str | Path) -> "Network":
    """Load the model of a run or of a model folder (`runs/mine`, `runs/mine/model` or a URI).

    The network is in evaluation mode, float32, on the CPU. It takes images float32[n, 1, 28, 28],
    which `mnistsum_ray.model.network.prepare_images` makes from pixels, and numbers int64[n], and
    returns the scores (logits) of each head: of the digits [n, 10], of the sums [n, 19].

    Raises:
        RequestError: there is no such model, it is damaged, or it is of another network.
    """
    from mnistsum_ray.model.folder import load_model as load_folder

    return load_folder(locate_existing(str(model), "model"))[0]


def save_model(model: "Network", folder: str | Path) -> None:
    """Write a network as a model folder, which `load_model`, scoring and `--init-from` take.

    Raises:
        RequestError: the folder cannot be written, or is not empty.
    """
    from mnistsum_ray.model.folder import copy_weights, describe_model, write_model

    output = empty_output(str(folder))
    weights = copy_weights(model)
    description = describe_model(weights, epoch=0, metrics={}, background=model.background)
    with refused("--output"):
        write_model(output, weights, description)


@dataclass(frozen=True)
class PicturePrediction:
    """The answers for one picture and a number."""

    number: int
    digit: int
    digit_prob: float
    sum: int
    sum_prob: float
    consistent: bool
    """Whether sum = digit + number."""
    unsure: bool
    """Whether the digit's probability is below 0.9."""
    pixels: Pixels = field(repr=False, compare=False)
    """uint8[28, 28]: what the network was given."""
    digit_probs: npt.NDArray[np.float32] = field(repr=False, compare=False)
    """Probabilities of all digits, float32[10]."""
    sum_probs: npt.NDArray[np.float32] = field(repr=False, compare=False)
    """Probabilities of all sums, float32[19]."""


def predict(
    model: Model, images: Any, numbers: Any, batch_size: int = 64, *, probabilities: bool = False
) -> Any:
    """Predict digits and sums in this process, on the model's device: of one picture, or of arrays.

        predict("runs/mine", "seven.png", 5)  # prepared by `prepare_picture`
        predict(model, images, numbers)  # uint8[n, 28, 28] as in training, and integers[n] in 0..9

    Returns:
        For a picture a `PicturePrediction`. Else arrays of n: `digit` int8, `digit_prob` float32,
        `sum` int8, `sum_prob` float32, and those of further heads; with `probabilities` those of
        all classes, `digit_probs` float32[n, 10] and `sum_probs` float32[n, 19].

    Raises:
        ValueError: wrong shape or dtype, a number out of range, or a batch size below 1.
        RequestError (a ValueError): no such picture or model, or nothing is drawn on the picture.
    """
    if isinstance(images, str | Path | bytes | Image.Image):
        return _predict_picture(model, images, numbers)

    from mnistsum_ray.model.inference import predict_pairs

    model = _loaded(model, batch_size)
    images, numbers = np.ascontiguousarray(images), np.asarray(numbers)
    if images.dtype != np.uint8 or images.shape != (len(images), 28, 28):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"images: must be uint8[n, 28, 28], are {found}")
    if numbers.shape != (len(images),) or not np.isin(numbers, range(NUMBERS)).all():
        raise ValueError(f"numbers: must be {len(images)} integers in 0..{NUMBERS - 1}")
    return predict_pairs(model, images, numbers.astype(np.int64), batch_size, probabilities)


def _predict_picture(model: Model, picture: Picture, number: int) -> PicturePrediction:
    if number not in range(NUMBERS):
        raise RequestError(f"the number is {number}, not one of 0..{NUMBERS - 1}")
    number = int(number)
    pixels = prepare_picture(picture)  # before the import of PyTorch: a refusal comes at once
    model = _loaded(model, 1)
    if model.background:
        pixels = 255 - pixels
    found = predict(model, pixels[None], np.array([number]), batch_size=1, probabilities=True)
    digit, total = int(found.digit[0]), int(found.sum[0])
    digit_prob = float(found.digit_prob[0])
    return PicturePrediction(
        number=number,
        digit=digit,
        digit_prob=digit_prob,
        sum=total,
        sum_prob=float(found.sum_prob[0]),
        consistent=total == digit + number,
        unsure=digit_prob < 0.9,
        pixels=pixels,
        digit_probs=found.digit_probs[0],
        sum_probs=found.sum_probs[0],
    )


def predict_rows(
    model: Model,
    rows: Any,
    image_column: str = "image",
    number_column: str = "number",
    batch_size: int = 64,
    *,
    probabilities: bool = False,
) -> Any:
    """Predict the digit and the sum of each row of a table.

    The table is a Ray Dataset, which is scored as it is read, or anything with
    `__arrow_c_stream__`, as frames of pandas, Polars and DuckDB and tables of Arrow have it.
    Images may have any form that scoring takes.

    Returns:
        A Ray Dataset for one, else an Arrow table, with all rows in their order and the columns
        that scoring adds, with `probabilities` those of all classes too. `reason` says why a row
        cannot be scored; the others are null there.

    Raises:
        TypeError: `rows` is something else.
        ValueError: a column is missing, has a type that cannot be read, or has the name of one that
            is added; or the batch size is below 1.
    """
    model = _loaded(model, batch_size)
    if "ray.data" in sys.modules and isinstance(rows, sys.modules["ray.data"].Dataset):
        from mnistsum_ray.cluster.workarounds import in_order

        def predict_block(block: pa.Table) -> pa.Table:
            names = (image_column, number_column)
            return predict_rows(model, block, *names, batch_size, probabilities=probabilities)

        return in_order(rows).map_batches(predict_block, batch_format="pyarrow")
    if not hasattr(rows, "__arrow_c_stream__"):
        kind = type(rows).__name__
        raise TypeError(f"rows: must have __arrow_c_stream__ or be a Ray Dataset, not {kind}")

    from mnistsum_ray.model.inference import predict_pairs

    table = pa.table(rows)
    taken = added_column(table.column_names, probabilities)
    if taken:
        raise ValueError(f"column {taken!r} would be added; rename it")
    images, bad_images = decode_images(_column(table, image_column, image_type_error))
    numbers, bad_numbers = decode_numbers(_column(table, number_column, number_type_error))
    predictions = predict_pairs(model, images, numbers, batch_size, probabilities)
    return predictions.append_to(table, numbers, join_reasons(bad_images, bad_numbers))


def _column(table: pa.Table, name: str, type_error: Callable[[Any], str | None]) -> pa.Array:
    """A column as one array; `type_error` says of its type why it cannot be read."""
    if table.column_names.count(name) != 1:
        present = ", ".join(map(repr, table.column_names))
        raise ValueError(f"there must be one column {name!r}; there are {present}")
    column = table[name]
    error = type_error(column.type)
    if error:
        raise ValueError(f"column {name!r} {error}")
    return one_chunk(column)


def _loaded(model: Model, batch_size: int) -> "Network":
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, is {batch_size}")
    return load_model(model) if isinstance(model, str | Path) else model
