"""Python API: train, score, load a model and predict. The jobs call the same functions."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import JobConfig, ScoreConfig, TrainConfig
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.errors import RequestError
from mnistsum_ray.frames import Rows, append_columns, as_array, columns_of, is_ray_dataset
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.results import ScoreResult, TrainResult
from mnistsum_ray.storage.paths import locate_existing

if TYPE_CHECKING:  # torch takes seconds to import; a wrong request is reported before that
    from mnistsum_ray.model.network import TwoHeadCNN
    from mnistsum_ray.model.predictions import Predictions

_RAY_LOGGERS: Final = ("ray", "ray.data")
"""Loggers that `fit` and `score` silence below ERROR: the console reports progress itself."""


def fit(config: TrainConfig) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or starts; that connection stays
    open. Progress goes to standard error.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed.
    """
    with _naming_arguments(TrainConfig):
        return run_training(config)


def run_training(config: TrainConfig) -> TrainResult:
    """Do as `fit`, with errors that name the flags of the shell."""
    from mnistsum_ray.training.preflight import preflight

    run = preflight(config)
    with _importing_torch():
        connect()

    from mnistsum_ray.training import driver

    # The loggers after the import of Ray Data, which sets the level of its logger.
    with quiet_logger(*_RAY_LOGGERS), Console() as console:
        return TrainResult.from_dict(driver.fit(run, console))


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. The cluster and the progress are those of `fit`.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed, or with `strict` some input cannot be used.
    """
    with _naming_arguments(ScoreConfig):
        return run_scoring(config)


def run_scoring(config: ScoreConfig) -> ScoreResult:
    """Do as `score`, with errors that name the flags of the shell."""
    from mnistsum_ray.scoring.preflight import preflight

    run = preflight(config)
    connect()  # `preflight` has imported torch

    from mnistsum_ray.scoring import driver

    with quiet_logger(*_RAY_LOGGERS), Console() as console:
        line, set_aside = driver.score(run, console)
        return ScoreResult.from_dict(line, set_aside=set_aside)


@contextmanager
def _naming_arguments(config: type[JobConfig]) -> Iterator[None]:
    """Have RequestErrors name arguments where they name flags of this config: `max_rows_per_file` for `--max-rows-per-file`.

    Other dashes stay as they are: in a path, or in a flag of Ray.
    """
    flags = "|".join(field.replace("_", "-") for field in config.model_fields)
    try:
        yield
    except RequestError as error:
        text = re.sub(rf"(?<![^\s(])--({flags})(?![\w-])", lambda flag: flag[1].replace("-", "_"), str(error))
        raise RequestError(text) from error


@contextmanager
def _importing_torch() -> Iterator[None]:
    """Import torch, which takes seconds, in a thread while the block runs: to start Ray is mostly to wait."""
    thread = Thread(target=import_module, args=("torch",))
    thread.start()
    try:
        yield
    finally:
        thread.join()  # a process that ended in the middle of an import would crash


def load_model(model: str) -> "TwoHeadCNN":
    """Load the model of a run or of a model folder: `runs/mine`, `runs/mine/model` or a URI.

    Returns:
        The network in evaluation mode, float32, on the CPU. Its inputs are prepared images float32[n, 1, 28, 28]
        (`mnistsum_ray.model.network.prepare_images` makes them from pixels) and numbers int64[n] in 0..9; its outputs are the
        scores (logits) of the digits [n, 10] and of the sums [n, 19]. `predict` takes pixels and returns digits and sums.

    Raises:
        RequestError: there is no such model, or its checksum differs from the one in its model.json.
    """
    from mnistsum_ray.model import serialization

    return serialization.load_model(locate_existing(model, "model"))[0]


def predict(model: "TwoHeadCNN", images: Pixels, numbers: npt.NDArray[np.integer[Any]], batch_size: int = 64) -> "Predictions":
    """Predict digits and sums in this process, on the model's device.

    Args:
        model: from `load_model`.
        images: uint8[n, 28, 28], 0 background, 255 ink, as in MNIST.
        numbers: integers[n] in 0..9.
        batch_size: rows in one forward pass, at least 1.

    Returns:
        Arrays of n: `digit` int8 in 0..9, `digit_prob` float32, `sum` int8 in 0..18, `sum_prob` float32.

    Raises:
        ValueError: wrong shape or dtype, a number outside of 0..9, or a batch size below 1.
    """
    from mnistsum_ray.model.inference import predict_pairs

    _check_batch_size(batch_size)
    images, numbers = np.ascontiguousarray(images), np.asarray(numbers)
    if images.dtype != np.uint8 or images.shape != (len(images), 28, 28):
        raise ValueError(f"images: must be uint8[n, 28, 28], are {images.dtype}{list(images.shape)}")
    if numbers.shape != (len(images),) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"numbers: must be integers[{len(images)}], are {numbers.dtype}{list(numbers.shape)}")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= 9:
        raise ValueError(f"numbers: must be 0..9, are {numbers.min()}..{numbers.max()}")
    return predict_pairs(model, images, numbers.astype(np.int64), batch_size)


def predict_rows(
    model: "TwoHeadCNN", rows: Rows, image_column: str = "image", number_column: str = "number", batch_size: int = 64
) -> Rows:
    """Predict the digit and the sum of each row of a table.

    Args:
        model: from `load_model`.
        rows: a pandas or Polars DataFrame, an Arrow table, or a Ray Dataset, whose tasks score it as it is read. Images may have
            any form that scoring takes: 784 pixels as bytes or as a list, 28 x 28 lists, PNG or JPEG bytes.
        image_column: column of the images.
        number_column: column of the numbers 0..9.
        batch_size: rows in one forward pass, at least 1.

    Returns:
        A table of the same kind, with all rows in their order, their columns as they are, and after them `pred_digit` int8,
        `digit_prob` float32, `pred_sum` int8, `sum_prob` float32, `consistent` bool, and `reason` string. Of a row that cannot be
        scored the first five are null, and `reason` says why; of all others `reason` is null.

    Raises:
        TypeError: `rows` is something else.
        ValueError: a column is missing, has a type that cannot be read, or has the name of one that is added; or the batch size
            is below 1.
    """
    _check_batch_size(batch_size)
    if is_ray_dataset(rows):
        import ray

        dataset: Any = rows
        arguments = (ray.put(model), image_column, number_column, batch_size)
        return dataset.map_batches(_predict_batch, batch_format="pyarrow", fn_args=arguments)  # type: ignore[no-any-return]
    return _predict_frame(rows, model, image_column, number_column, batch_size)


def _predict_batch(batch: pa.Table, model: Any, *arguments: Any) -> pa.Table:
    import ray

    return _predict_frame(batch, ray.get(model), *arguments)


def _predict_frame(rows: Rows, model: "TwoHeadCNN", image: str, number: str, batch_size: int) -> Rows:
    from mnistsum_ray.model.predictions import PREDICTION_FIELDS
    from mnistsum_ray.model.tables import REASON, predict_columns

    columns = columns_of(rows, (image, number), added=(*PREDICTION_FIELDS.names, REASON))
    return append_columns(rows, predict_columns(model, columns, batch_size))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, is {batch_size}")


def decode_images(images: Any) -> tuple[Pixels, dict[int, str]]:
    """Decode images of any form that scoring takes: 784 pixels as bytes or as a list, 28 x 28 lists, PNG or JPEG bytes.

    Args:
        images: an Arrow array, a pandas or Polars Series, or a list, all of one form.

    Returns:
        uint8[n, 28, 28], 0 background, 255 ink; and for each value that is no such image, its index and the reason. These images
        are zeros.

    Raises:
        ValueError: the values have another form.
    """
    from mnistsum_ray.data import images as columns
    from mnistsum_ray.data.images import image_type_error, one_chunk
    from mnistsum_ray.data.parquet_types import plain_table

    column = one_chunk(plain_table(pa.table({"images": as_array(images, "images")}))["images"])
    error = image_type_error(column.type)
    if error:
        raise ValueError(f"images: {error}")
    return columns.decode_images(column)
