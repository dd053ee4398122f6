"""Python API: train and score on a cluster; load a model, and predict in this process."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyarrow as pa

from mnistsum_ray.cluster.connection import connect, head_answers, send_by_value
from mnistsum_ray.config import Place, ScoreConfig, TrainConfig
from mnistsum_ray.data.columns.base import ColumnError, decode_columns, find_columns, rows_in
from mnistsum_ray.errors import RequestError, RunError, TryAgainError, one_line, shortened
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.results import ScoreResult, TrainResult
from mnistsum_ray.storage.uri import as_request_error, empty_output, locate_existing
from mnistsum_ray.task import BUILT_IN, Task
from mnistsum_ray.task_loader import code_of, load_task

if TYPE_CHECKING:  # torch and Ray take seconds to import
    from ray.train import UserCallback
    from torch import nn

    from mnistsum_ray.model.folder import LoadedModel

TaskName: TypeAlias = type[Task] | str
"""A class of Task, or its name: `file.py:Class` or `module:Class`."""


_DECODED_BYTES: Final = 64 * 2**20
"""Rows that `predict_rows` decodes at once."""


def fit(config: TrainConfig, callbacks: Sequence["UserCallback"] = ()) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or
    starts; that connection stays open. Ray's processes end with the thread that has started them,
    so a program that calls this from threads calls `ray.init()` in its main thread first. If the
    head of the cluster is lost, Ray's core ends this process with exit code 1 after 60 s
    (RAY_gcs_rpc_server_reconnect_timeout_s). Progress goes to standard error.

    `callbacks` are called by Ray Train in a process of its own, after an epoch with the metrics
    `epoch`, `train_loss`, `validation` and `test`. What one raises ends the run.

    Raises:
        RequestError: the request is invalid; the message names the field and says what to do.
        RunError: the run has begun and failed; after a TryAgainError the same call may work later.
        RunInterrupted: a KeyboardInterrupt, whose message says how to resume. (Before the run has
            begun it is a plain KeyboardInterrupt.)
    """
    from mnistsum_ray.training.request import check_request

    console = Console()
    start_progress = partial(Progress, console.progress)  # takes what is counted, and its total
    request = check_request(config, start_progress)
    for notice in (request.source.notice, request.notice):
        if notice:
            console.say(notice)
    with _on_cluster(console, str(request.config.name), config.task_class):
        from mnistsum_ray.training.job import train

        return train(request, console, callbacks)


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. Cluster, progress and errors are as in `fit`.

    A RunError also says that nothing could be scored or, with `strict`, that some input could not.
    """
    from mnistsum_ray.scoring.request import check_request

    console = Console()
    request = check_request(config, console)
    with _on_cluster(console, Path(request.output.path).name, config.task_class):
        from mnistsum_ray.scoring import job

        return job.score(request, console)


@contextmanager
def _on_cluster(console: Console, run: str, task: type[Task]) -> Iterator[None]:
    """Join a cluster or start one; if its head is lost, a RunError becomes a TryAgainError.

    Ray logs no more here: what it logs as an error it raises too, and its warnings advise what the
    user of a job cannot do, or repeat its console.
    """
    console.run = run
    console.say(connect())
    send_by_value(task)
    import_module("ray.data")  # now, since its import sets the level of its logger
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        # Of `max_restarts` in scoring: Ray 2.60 has no other way to limit how often a process is
        # started again.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        try:
            yield
        except RunError as error:
            if head_answers():
                raise
            raise TryAgainError(f"the head of the Ray cluster does not answer; {error}") from error
        finally:
            console.end_progress()


def load_model(model: Place, task: TaskName = BUILT_IN) -> "nn.Module":
    """Load the model of a run or of a model folder (`runs/mine`, `runs/mine/model` or a URI).

    The network is in evaluation mode, on the CPU. It takes a batch of its task: a dict of tensors
    by the names of `inputs`.

    Raises:
        RequestError: there is no such model, it is damaged, or it is of another task.
        TryAgainError: the storage does not answer.
    """
    return _load(model, load_task(task)).network


def _load(model: Place, task: type[Task]) -> "LoadedModel":
    from mnistsum_ray.model.folder import load_model as load_folder

    return load_folder(locate_existing(os.fspath(model), "model"), task)


def save_model(model: "nn.Module", folder: Place, task: TaskName | Task = BUILT_IN) -> None:
    """Write a network as a model folder, which `load_model`, scoring and `--init-from` take.

    A task whose network depends on its settings must be given with them: `Shapes(settings)`.

    Raises:
        RequestError: the folder cannot be written, or is not empty; or the model is another
            network than that of the task, and could not be loaded again.
        TryAgainError: the storage does not answer.
    """
    from mnistsum_ray.model.folder import copy_weights, describe_model, write_model

    output = empty_output(os.fspath(folder), "folder")
    made = task if isinstance(task, Task) else load_task(task)()
    copy = made.network()
    try:
        copy.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise RequestError(
            f"the model is not a {type(copy).__name__}, and could not be loaded again: "
            f"{shortened(one_line(error))}"
        ) from None
    weights = copy_weights(copy)
    with as_request_error("folder"):
        write_model(output, weights, describe_model(made, weights, code_of(type(made)), epoch=0))


def predict_rows(
    model: "nn.Module | Place",
    rows: Any,
    task: TaskName | Task = BUILT_IN,
    *,
    probabilities: bool = False,
    **columns: str,
) -> Any:
    """Predict each row of a table, as scoring does.

    The table is a Ray Dataset, which is scored as it is read, or what `pyarrow.table` takes: frames
    of pandas, Polars and DuckDB, tables of Arrow, a dict of columns. Other names of the task's
    inputs there are given as `image_column="pixels"`.

    Returns:
        A Ray Dataset for one, else an Arrow table: all rows in their order, with the columns that
        scoring adds.

    Raises:
        RequestError: `rows` is something else, or a keyword names no column of the task; a column
            is not there, or twice, cannot be read, or has the name of one that is added; and those
            of `load_model`, as TryAgainError, where the model is named.
        RunError: a prediction is not finite.
    """
    made = task if isinstance(task, Task) else load_task(task)()
    if isinstance(model, str | os.PathLike):
        made, network, _ = _load(model, type(made))  # the task with the model's settings
    else:
        network = model
    if "ray.data" in sys.modules and isinstance(rows, sys.modules["ray.data"].Dataset):
        from mnistsum_ray.cluster.workarounds import in_order

        send_by_value(type(made))

        def predict_block(block: pa.Table) -> pa.Table:
            return predict_rows(network, block, made, probabilities=probabilities, **columns)

        return in_order(rows).map_batches(predict_block, batch_format="pyarrow")

    from mnistsum_ray.model.inference import append_predictions, clashing_column
    from mnistsum_ray.model.inference import predict_rows as predict_arrays

    try:
        table = pa.table(rows)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise RequestError(
            f"rows: cannot be read as a table: {shortened(one_line(error))}"
        ) from None
    names = _names_in(table, made, columns)
    clashing = clashing_column(made, table.column_names, probabilities=probabilities)
    if clashing:
        raise RequestError(f"rows: column {clashing!r} would be added; rename it")
    batch_size = 64  # to which a small table is padded: padding to 256 takes four times as long
    step = batch_size * max(1, rows_in(_DECODED_BYTES, made.inputs.values()) // batch_size)
    done = []
    for start in range(0, max(1, table.num_rows), step):
        part = table.slice(start, step)
        arrays, reasons = decode_columns(made.inputs, part, names, for_batch=True)
        found = predict_arrays(made, network, arrays, batch_size, probabilities=probabilities)
        done.append(append_predictions(made, part, found, reasons))
    return pa.concat_tables(done)


def _names_in(table: pa.Table, task: Task, given: dict[str, str]) -> dict[str, str]:
    """Return the names of the task's inputs in a table; errors as of `predict_rows`."""
    flags = {key: column.flag or f"{key}_column" for key, column in task.inputs.items()}
    unknown = given.keys() - flags.values()
    if unknown:
        raise RequestError(f"{min(unknown)} is not one of {', '.join(flags.values())}")
    names = {key: given.get(flag) for key, flag in flags.items()}
    try:
        return find_columns(task.inputs, table.schema, names, flags.__getitem__)
    except ColumnError as error:
        raise RequestError(f"rows: {error}") from None
