"""Python API of a model: load it, and predict a picture, arrays, or the rows of a frame of pandas, Polars, Arrow or Ray Data."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from mnistsum_ray.data import images as image_columns
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.order import NUMBERS
from mnistsum_ray.data.parquet import plain_table
from mnistsum_ray.data.picture import prepare_picture
from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.heads import PREDICTION_FIELDS, PROBABILITY_FIELDS, HeadFields
from mnistsum_ray.storage.paths import locate_existing

if TYPE_CHECKING:  # torch takes seconds to import
    from mnistsum_ray.model.inference import Predictions
    from mnistsum_ray.model.network import Network

Model: TypeAlias = "Network | str | Path"
"""A model of `load_model`, or what that takes."""

Rows = TypeVar("Rows")
"""A pandas or Polars DataFrame, an Arrow table, or a Ray Dataset."""

_SURE: Final = 0.9
"""Least probability of the digit of a picture whose answer is sure."""

_REASON: Final = "reason"
"""Column with the reason of each row that cannot be scored."""


def load_model(model: str | Path) -> "Network":
    """Load the model of a run or of a model folder (`runs/mine`, `runs/mine/model` or a URI) for `predict` and `predict_rows`.

    The network is in evaluation mode, float32, on the CPU. It takes images float32[n, 1, 28, 28], which
    `mnistsum_ray.model.network.prepare_images` makes from pixels, and numbers int64[n] in 0..NUMBERS - 1, and returns the
    scores (logits) of each head: of the digits [n, 10], of the sums [n, 9 + NUMBERS].

    Raises:
        RequestError: there is no such model, or its checksum differs from the one in its model.json.
    """
    from mnistsum_ray.model import serialization

    return serialization.load_model(locate_existing(str(model), "model"))[0]


@dataclass(frozen=True)
class PicturePrediction(HeadFields, names=("{}", "{}_prob", "{}_probs")):
    """The answers for one picture and a number."""

    number: int
    digit: int
    digit_prob: float
    sum: int
    sum_prob: float
    consistent: bool
    """Whether sum = digit + number."""
    prepared: str
    """How the picture was prepared."""
    unsure: str | None
    """Why the answer may be wrong: what the picture shows beside a digit, or how little probability the digit has."""
    pixels: Pixels = field(repr=False, compare=False)
    """uint8[28, 28]: what the network was given."""
    digit_probs: npt.NDArray[np.float32] = field(repr=False, compare=False)
    """Probabilities of all digits, float32[10]."""
    sum_probs: npt.NDArray[np.float32] = field(repr=False, compare=False)
    """Probabilities of all sums, float32[19]."""


@overload
def predict(model: Model, images: str | Path | Image.Image, numbers: int, *, prepare: bool = True) -> PicturePrediction: ...


@overload
def predict(
    model: Model, images: Pixels, numbers: npt.NDArray[np.integer[Any]], batch_size: int = 64, *, probabilities: bool = False
) -> "Predictions": ...


def predict(
    model: Model, images: Any, numbers: Any, batch_size: int = 64, *, prepare: bool = True, probabilities: bool = False
) -> "PicturePrediction | Predictions":
    """Predict digits and sums in this process, on the model's device: of one picture, or of arrays.

        predict("runs/mine", "seven.png", 5)
        predict(model, images, numbers)

    A picture (a file, a URI, or one of Pillow's) may have any size, and is prepared as MNIST's were, with the ink of the model's
    training images, dark or light; without `prepare` 28 x 28 pixels are taken as they are. Its number is an integer in
    0..NUMBERS - 1 (see `data/order.py`). Arrays are integers[n], and uint8[n, 28, 28] as the training images: of MNIST 0
    background, 255 ink.

    Returns:
        Arrays of n: `digit` int8, `digit_prob` float32, `sum` int8, `sum_prob` float32, and those of further heads; with
        `probabilities` those of all classes, `digit_probs` float32[n, 10] and `sum_probs` float32[n, 19]. For a picture plain
        numbers of these names, both arrays without n, `consistent`, `prepared`, which says how the picture was prepared, and
        `unsure`: why the answer may be wrong, or None.

    Raises:
        ValueError: wrong shape or dtype, a number out of range, or a batch size below 1.
        RequestError (a ValueError): there is no such picture or model, or it is not one digit darker or lighter than its
            background.
    """
    if isinstance(images, str | Path | Image.Image):
        return _predict_picture(model, images, numbers, prepare)

    from mnistsum_ray.model.inference import predict_pairs

    model = _loaded(model, batch_size)
    images, numbers = np.ascontiguousarray(images), np.asarray(numbers)
    if images.dtype != np.uint8 or images.shape != (len(images), 28, 28):
        raise ValueError(f"images: must be uint8[n, 28, 28], are {images.dtype}{list(images.shape)}")
    if numbers.shape != (len(images),) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"numbers: must be integers[{len(images)}], are {numbers.dtype}{list(numbers.shape)}")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < NUMBERS:
        raise ValueError(f"numbers: must be 0..{NUMBERS - 1}, are {numbers.min()}..{numbers.max()}")
    return predict_pairs(model, images, numbers.astype(np.int64), batch_size, probabilities)


def _predict_picture(model: Model, picture: str | Path | Image.Image, number: int, prepare: bool) -> PicturePrediction:
    if number not in range(NUMBERS):
        raise RequestError(f"the number is {number}, not one of 0..{NUMBERS - 1}")
    model = _loaded(model, 1)
    prepared = prepare_picture(picture, model.background, prepare=prepare)
    numbers = np.array([int(number)])
    found = predict(model, prepared.pixels[None], numbers, batch_size=1, probabilities=True)
    columns = zip(PREDICTION_FIELDS.names, found.columns(numbers), strict=True)
    answers = {name.removeprefix("pred_"): values.item() for name, values in columns}
    answers |= {name: found.values[name][0] for name in PROBABILITY_FIELDS.names}
    doubts = [*prepared.doubts]
    if answers["digit_prob"] < _SURE:
        doubts.append(f"the digit's probability is below {_SURE:.0%}")
    if not answers["consistent"]:
        doubts.append("digit and sum disagree")
    unsure = "; ".join(doubts) or None
    return PicturePrediction(number=int(number), prepared=prepared.how, unsure=unsure, pixels=prepared.pixels, **answers)


def predict_rows(
    model: Model,
    rows: Rows,
    image_column: str = "image",
    number_column: str = "number",
    batch_size: int = 64,
    *,
    probabilities: bool = False,
) -> Rows:
    """Predict the digit and the sum of each row of a table: of pandas, Polars, Arrow, or a Ray Dataset, scored as it is read.

    Images may have any form that `decode_images` takes.

    Returns:
        A table of the same kind, with all rows in their order, their columns as they are, and after them `pred_digit` int8,
        `digit_prob` float32, `pred_sum` int8, `sum_prob` float32, those of further heads, `consistent` bool, and `reason` string.
        Of a row that cannot be scored all but `reason` are null, and `reason` says why; of all others `reason` is null. In pandas
        they have its nullable types (`Int8`, `Float32`, `boolean`, `string`). With `probabilities`, `digit_probs` and `sum_probs`
        are in front of `reason`: lists of 10 and of 19 float32, in pandas NumPy arrays.

    Raises:
        TypeError: `rows` is something else.
        ValueError: a column is missing, has a type that cannot be read, or has the name of one that is added; or the batch size
            is below 1.
    """
    model = _loaded(model, batch_size)
    data: Any = rows
    if _is_a(data, "ray.data", "Dataset"):
        from mnistsum_ray.cluster.ray_internals import in_order

        columns = {"image_column": image_column, "number_column": number_column}
        block = partial(predict_rows, model, **columns, batch_size=batch_size, probabilities=probabilities)
        return in_order(data).map_batches(block, batch_format="pyarrow")  # type: ignore[no-any-return]
    polars, pandas = _is_a(data, "polars", "DataFrame"), _is_a(data, "pandas", "DataFrame")
    if not (polars or pandas or isinstance(data, pa.Table)):
        raise TypeError(f"rows: must be a pandas or Polars DataFrame, an Arrow table or a Ray Dataset, not {type(data).__name__}")
    present = list(data.column_names if isinstance(data, pa.Table) else data.columns)
    for name in (image_column, number_column):
        if present.count(name) != 1:
            raise ValueError(f"there must be one column {name!r}; there are {', '.join(map(repr, present))}")
    names = [*PREDICTION_FIELDS.names, *(PROBABILITY_FIELDS.names if probabilities else ()), _REASON]
    taken = next((name for name in present if str(name).lower() in names), None)
    if taken is not None:
        raise ValueError(f"column {taken!r} would be added; rename it")

    added = _predicted_columns(model, data, image_column, number_column, batch_size, probabilities)
    # The columns of the frame are not converted back, so all values and types stay as they are.
    if polars:
        columns = {name: sys.modules["polars"].from_arrow(values) for name, values in added.items()}
        return data.with_columns(**columns)  # type: ignore[no-any-return]
    if pandas:
        pd = sys.modules["pandas"]
        # Types that have a null: integers would become floats, as NaN is one.
        types = {pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.float32(): pd.Float32Dtype()}
        types |= {pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype()}
        columns = {name: values.to_pandas(types_mapper=types.get).array for name, values in added.items()}
        return data.assign(**columns)  # type: ignore[no-any-return]
    for name, values in added.items():
        data = data.append_column(name, values)
    return data  # type: ignore[no-any-return]


def _predicted_columns(model: "Network", frame: Any, image: str, number: str, batch: int, probs: bool) -> dict[str, pa.Array]:
    """The columns that `predict_rows` adds, by name."""
    from mnistsum_ray.model.inference import predict_pairs

    images, bad_images = image_columns.decode_images(_column(frame[image], f"column {image!r}", image_columns.image_type_error))
    numbers, bad_numbers = image_columns.decode_numbers(
        _column(frame[number], f"column {number!r}", image_columns.number_type_error)
    )
    bad_rows = image_columns.join_reasons(bad_images, bad_numbers)
    reasons = [bad_rows.get(row) for row in range(len(numbers))]
    bad = np.array([reason is not None for reason in reasons], bool)
    predictions = predict_pairs(model, images, numbers, batch, probs)
    return predictions.to_arrow(numbers, bad) | {_REASON: pa.array(reasons, pa.string())}


def _loaded(model: Model, batch_size: int) -> "Network":
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, is {batch_size}")
    return load_model(model) if isinstance(model, str | Path) else model


def decode_images(images: Any) -> tuple[Pixels, dict[int, str]]:
    """Decode an Arrow array, a pandas or Polars Series, or a list of images of one form that scoring takes: 784 pixels as bytes
    or as a list, 28 x 28 lists, PNG or JPEG bytes.

    Returns:
        uint8[n, 28, 28], 0 background, 255 ink; and for each value that is no such image, its index and the reason. These images
        are zeros.

    Raises:
        ValueError: the values have another form.
    """
    return image_columns.decode_images(_column(images, "images", image_columns.image_type_error))


def _column(values: Any, name: str, type_error: Callable[[pa.DataType], str | None]) -> pa.Array:
    """Convert a list, a Series of pandas or Polars, or an Arrow array to one Arrow array of a plain type.

    Raises:
        ValueError: the values have no common type, or one for which `type_error` returns a reason.
    """
    try:
        column = values.to_arrow() if _is_a(values, "polars", "Series") else values
        column = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from None
    plain = plain_table(pa.table({"values": column}))["values"]
    unusable = type_error(plain.type)
    if unusable:
        raise ValueError(f"{name}: {unusable}")
    return image_columns.one_chunk(plain)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Return whether a value is of a class of a library that may not be installed: if it is not imported, no value is."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))
