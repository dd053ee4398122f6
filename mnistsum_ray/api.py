"""Python API: train, score, load a model and predict. The jobs call the same functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.data.pixels import Pixels
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.reporting.process_state import quiet_logger
from mnistsum_ray.storage.paths import locate_existing

if TYPE_CHECKING:  # torch takes seconds to import; a wrong request is reported before that
    from mnistsum_ray.model.network import TwoHeadCNN
    from mnistsum_ray.model.predictions import Predictions

_RAY_LOGGERS: Final = ("ray", "ray.data")
"""Loggers that `fit` and `score` silence below ERROR: the console reports progress itself."""


def fit(config: TrainConfig) -> dict[str, Any]:
    """Train a model, as `python jobs/train.py` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or starts; that connection stays
    open. Progress goes to standard error.

    Returns:
        The fields of the job's last line: `run` and `model` (folders or URIs), `parameters`, `data` (`source` and the rows of
        each split), `test` (`rows`, `pairs`, `loss` in nats, `digit_accuracy` and `sum_accuracy` in 0..1), `images_per_second`,
        `seconds`, and with `mlflow` set its run id.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed.
    """
    from mnistsum_ray.training.preflight import preflight

    run = preflight(config)
    with _importing_torch():
        connect()

    from mnistsum_ray.training import driver

    with quiet_logger(*_RAY_LOGGERS):  # after the import of Ray Data, which sets the level of its logger
        return driver.fit(run, Console())


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score Parquet files, as `python jobs/score.py` does. The cluster and the progress are those of `fit`.

    Returns:
        The fields of the job's last line: `output` (folder or URI); `input_rows`, `scored_rows`, `rejected_rows`,
        `resumed_rows`, `files`, `failed_files`, all counts; `rows_per_second`, `seconds`; and with `label_column` set
        `digit_accuracy` and `sum_accuracy` in 0..1, or None where no row has a label.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed, or with `strict` some input cannot be used.
    """
    from mnistsum_ray.scoring.preflight import preflight

    run = preflight(config)
    connect()  # `preflight` has imported torch

    from mnistsum_ray.scoring import driver

    with quiet_logger(*_RAY_LOGGERS):
        return driver.score(run, Console())


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
        batch_size: rows in one forward pass.

    Returns:
        Arrays of n: `digit` int8 in 0..9, `digit_prob` float32, `sum` int8 in 0..18, `sum_prob` float32.

    Raises:
        ValueError: wrong shape or dtype, or a number outside of 0..9.
    """
    from mnistsum_ray.model.inference import predict_pairs

    images, numbers = np.asarray(images), np.asarray(numbers)
    if images.dtype != np.uint8 or images.shape != (len(images), 28, 28):
        raise ValueError(f"images: must be uint8[n, 28, 28], are {images.dtype}{list(images.shape)}")
    if numbers.shape != (len(images),) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"numbers: must be integers[{len(images)}], are {numbers.dtype}{list(numbers.shape)}")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= 9:
        raise ValueError(f"numbers: must be 0..9, are {numbers.min()}..{numbers.max()}")
    return predict_pairs(model, images, numbers.astype(np.int64), batch_size)
