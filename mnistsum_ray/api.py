"""Training, scoring and the model from Python; the jobs call the same."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.data.decoding import Pixels
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.storage.location import locate_existing

if TYPE_CHECKING:  # torch takes seconds to import, which a refused request should not wait for
    from mnistsum_ray.model.inference import Predictions
    from mnistsum_ray.model.network import TwoHeadCNN


def fit(config: TrainConfig) -> dict[str, Any]:
    """Train, as `python jobs/train.py` does, on the cluster that this process is connected to or else as `connect` finds one.

    What it says while it runs goes to standard error.

    Returns:
        The fields of the job's last line: `run` and `model` (folders or URIs), `parameters`, `data` (`source` and the rows of
        each split), `test` (`rows`, `pairs`, `loss` in nats, `digit_accuracy` and `sum_accuracy` in 0..1), `images_per_second`,
        `seconds`, and with `mlflow` set its run id.

    Raises:
        RequestError: the request cannot be carried out as it stands.
        RunError: it was begun and did not come about.
    """
    from mnistsum_ray.training.preflight import preflight

    run = preflight(config)
    connect()

    from mnistsum_ray.training import driver

    return driver.fit(run, Console())


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score Parquet, as `python jobs/score.py` does, on the cluster that this process is connected to or as `connect` finds one.

    Returns:
        The fields of the job's last line: `output` (folder or URI); `input_rows`, `scored_rows`, `rejected_rows`,
        `resumed_rows`, `files`, `failed_files`, all counts; `rows_per_second`, `seconds`; and with `label_column` set
        `digit_accuracy` and `sum_accuracy` in 0..1, or None where no row has a label.

    Raises:
        RequestError: the request cannot be carried out as it stands.
        RunError: it was begun and did not come about, or with `strict` some input cannot be used.
    """
    from mnistsum_ray.scoring.preflight import preflight

    run = preflight(config)
    connect()

    from mnistsum_ray.scoring import driver as scoring

    return scoring.score(run, Console())


def load_model(model: str) -> "TwoHeadCNN":
    """Load the model of a run, or of a model folder: `runs/mine`, `runs/mine/model` or a URI.

    Returns:
        The network in evaluation mode, float32, on the CPU. It takes prepared images float32[n, 1, 28, 28]
        (`mnistsum_ray.model.prepare_images` makes them of pixels) and numbers int64[n] in 0..9, and gives the scores (logits)
        of the digits [n, 10] and of the sums [n, 19]. `predict` takes pixels and gives answers.

    Raises:
        RequestError: there is no such model, or its checksum is not that of its card.
    """
    from mnistsum_ray.model import serialization

    return serialization.load_model(locate_existing(model, "model"))[0]


def predict(model: "TwoHeadCNN", images: Pixels, numbers: npt.NDArray[np.integer[Any]], batch_size: int = 64) -> "Predictions":
    """Answer pairs in this process, on the device where the model is.

    Args:
        model: as `load_model` gives it.
        images: uint8[n, 28, 28], 0 background, 255 ink, as MNIST is.
        numbers: integers[n] in 0..9.
        batch_size: rows in one forward pass.

    Returns:
        Arrays of n: `digit` int8 in 0..9, `digit_prob` float32, `sum` int8 in 0..18, `sum_prob` float32.

    Raises:
        ValueError: shapes, dtypes or numbers are others.
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
