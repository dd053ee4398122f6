"""Python API: train and score on a cluster; load a model, and predict in this process."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import pyarrow as pa

from mnistsum_ray.cluster.connection import connect, head_answers
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.data.images import (
    Picture,
    decode_images,
    decode_numbers,
    image_type_error,
    join_reasons,
    number_type_error,
    prepare_picture,
)
from mnistsum_ray.data.randomness import NUMBERS
from mnistsum_ray.errors import RequestError, RunError, TryAgainError, one_line, shortened
from mnistsum_ray.model.heads import HEADS, clashing_column
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.results import SURE, PicturePrediction, ScoreResult, TrainResult
from mnistsum_ray.storage.uri import as_request_error, empty_output, locate_existing

if TYPE_CHECKING:  # torch and Ray take seconds to import
    from ray.data import Dataset
    from ray.train import UserCallback

    from mnistsum_ray.model.network import TwoHeadCNN

Model: TypeAlias = "TwoHeadCNN | str | Path"
"""A model of `load_model`, or what that takes."""


def fit(config: TrainConfig, callbacks: Sequence["UserCallback"] = ()) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or
    starts; that connection stays open. Progress goes to standard error. If the head of a cluster is
    lost that this process has joined, the process ends with exit code 75: Ray's own core would end
    it too.

    `callbacks` are called by Ray Train in a process of its own, after an epoch with the metrics
    `epoch`, `train_loss`, `validation` and `test`. What one raises ends the run.

    Raises:
        RequestError: the request is invalid; the message names the field and says what to do.
        RunError: the run has begun and failed; after a TryAgainError the same call may work later.
        RunInterrupted: a KeyboardInterrupt, whose message says how to go on. (Before the run has
            begun it is a plain KeyboardInterrupt.)
    """
    from mnistsum_ray.training.run import check_request

    with Console() as console:
        start_progress = partial(Progress, console.progress)  # takes what is counted, and its total
        request = check_request(config, start_progress)
        if request.source.notice:
            console.say(request.source.notice)
        with _on_cluster(console, str(request.config.name)):
            from mnistsum_ray.training.job import train

            return train(request, console, callbacks)


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. Cluster, progress and errors are as in `fit`.

    A RunError also says that nothing could be scored or, with `strict`, that some input could not.
    """
    from mnistsum_ray.scoring.request import check_request

    with Console() as console:
        request = check_request(config, console)
        with _on_cluster(console, Path(request.output.path).name):
            from mnistsum_ray.scoring import job

            return job.score(request, console)


@contextmanager
def _on_cluster(console: Console, run: str) -> Iterator[None]:
    """Join a cluster or start one; if its head is gone, a RunError becomes a TryAgainError.

    Ray's warnings are hidden: they advise what the user of a job cannot do, or repeat its console.
    """
    console.run = run
    console.say(connect())
    import_module("ray.data")  # now, since its import sets the level of its logger
    loggers = [logging.getLogger("ray"), logging.getLogger("ray.data")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # Of `max_restarts` in scoring: Ray 2.60 has no other way to limit how often a process is
        # started again.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)  # what it logs as an error it raises too
            yield
        except RunError as error:
            if head_answers():
                raise
            raise TryAgainError(f"the head of the Ray cluster does not answer; {error}") from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def load_model(model: str | Path) -> "TwoHeadCNN":
    """Load the model of a run or of a model folder (`runs/mine`, `runs/mine/model` or a URI).

    The network is in evaluation mode, on the CPU. It takes float32[n, 1, 28, 28] of
    `model.network.prepare_images` and numbers int64[n], and returns the logits of the
    digits [n, 10] and of the sums [n, 19].

    Raises:
        RequestError: there is no such model, it is damaged, or it is of another network.
        TryAgainError: the storage does not answer.
    """
    from mnistsum_ray.model.folder import load_model as load_folder

    return load_folder(locate_existing(str(model), "model"))[0]


def save_model(model: "TwoHeadCNN", folder: str | Path) -> None:
    """Write a network as a model folder, which `load_model`, scoring and `--init-from` take.

    Raises:
        RequestError: the folder cannot be written, or is not empty; or the model is of another
            network, and could not be loaded again.
        TryAgainError: the storage does not answer.
    """
    from mnistsum_ray.model.folder import copy_weights, describe_model, write_model
    from mnistsum_ray.model.network import make_network

    output = empty_output(str(folder), "folder")
    copy = make_network()
    try:
        copy.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise RequestError(
            f"the model is no {type(copy).__name__}, and could not be loaded again: "
            f"{shortened(one_line(error))}"
        ) from None
    weights = copy_weights(copy)
    with as_request_error("folder"):
        write_model(output, weights, describe_model(weights, epoch=0, metrics={}))


def predict(model: Model, picture: Picture, number: int) -> PicturePrediction:
    """Predict the digit of a picture, and digit + number, in this process.

    `prepare_picture` makes of the picture what the network was trained on.

    Raises:
        RequestError: no such picture or model, nothing is drawn on the picture, or the number is
            out of range.
        TryAgainError: the storage does not answer.
        RunError: the model's logits are not finite.
    """
    if number not in range(NUMBERS):
        raise RequestError(f"the number is {number}, not one of 0..{NUMBERS - 1}")
    pixels = prepare_picture(picture)  # before the import of PyTorch: a refusal comes at once
    network = _loaded(model)

    from mnistsum_ray.model.inference import predict_pairs

    found = predict_pairs(network, pixels[None], np.array([number]), batch_size=1)
    answers: dict[str, Any] = {"number": int(number)}
    for head in HEADS:
        answers[head.name] = found[f"pred_{head.name}"][0].item()
        answers[f"{head.name}_prob"] = found[f"{head.name}_prob"][0].item()
    answers["consistent"] = answers["sum"] == answers["digit"] + number
    return PicturePrediction(**answers, unsure=answers["digit_prob"] < SURE)


@overload
def predict_rows(
    model: Model,
    rows: "Dataset",
    image_column: str = ...,
    number_column: str = ...,
    *,
    probabilities: bool = ...,
) -> "Dataset": ...
@overload
def predict_rows(  # type: ignore[overload-cannot-match]  # mypy here knows no Ray
    model: Model,
    rows: Any,
    image_column: str = ...,
    number_column: str = ...,
    *,
    probabilities: bool = ...,
) -> pa.Table: ...
def predict_rows(
    model: Model,
    rows: Any,
    image_column: str = "image",
    number_column: str = "number",
    *,
    probabilities: bool = False,
) -> Any:
    """Predict the digit and the sum of each row of a table, as scoring does.

    The table is a Ray Dataset, which is scored as it is read, or what `pyarrow.table` takes: frames
    of pandas, Polars and DuckDB, tables of Arrow, a dict of columns.

    Returns:
        A Ray Dataset for one, else an Arrow table: all rows in their order, with the columns that
        scoring adds.

    Raises:
        TypeError: `rows` is something else.
        KeyError: a column is not there, or twice.
        ValueError: a column cannot be read, or has the name of one that is added.
        RequestError, TryAgainError: of `load_model`, where the model is named.
        RunError: the model's logits are not finite.
    """
    network = _loaded(model)
    if "ray.data" in sys.modules and isinstance(rows, sys.modules["ray.data"].Dataset):
        from mnistsum_ray.cluster.workarounds import in_order

        def predict_block(block: pa.Table) -> pa.Table:
            columns = (image_column, number_column)
            return predict_rows(network, block, *columns, probabilities=probabilities)

        return in_order(rows).map_batches(predict_block, batch_format="pyarrow")

    from mnistsum_ray.model.inference import append_predictions, predict_pairs

    table = pa.table(rows)  # a TypeError says what it takes
    clashing = clashing_column(table.column_names, probabilities)
    if clashing:
        raise ValueError(f"column {clashing!r} would be added; rename it")
    for name, type_error in ((image_column, image_type_error), (number_column, number_type_error)):
        error = type_error(table[name].type)
        if error:
            raise ValueError(f"column {name!r} {error}")
    images, bad_images = decode_images(table[image_column])
    numbers, bad_numbers = decode_numbers(table[number_column])
    batch_size = 64  # to which a small table is padded: padding to 256 takes four times as long
    predictions = predict_pairs(network, images, numbers, batch_size, probabilities)
    reasons = join_reasons(bad_images, bad_numbers)
    return append_predictions(table, predictions, numbers, reasons)


def _loaded(model: Model) -> "TwoHeadCNN":
    return load_model(model) if isinstance(model, str | Path) else model
