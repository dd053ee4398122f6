"""Python API of the jobs: train and score on a cluster."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mnistsum_ray.cluster.connection import connect, head_answers
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.errors import RunError, TryAgainError
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.results import ScoreResult, TrainResult

if TYPE_CHECKING:
    from ray.train import UserCallback


def fit(config: TrainConfig, callbacks: Sequence["UserCallback"] = ()) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or
    starts; that connection stays open. Progress goes to standard error.

    `callbacks` are `ray.train.UserCallback`s, which Ray Train calls in a process of its own. Each
    report, after an epoch, has the metrics `epoch`, `train_loss`, `validation` and `test`. What a
    callback raises counts as a failure.

    Raises:
        RequestError: the request is invalid; the message names the field and says what to do.
        RunError: the run has begun and failed.
    """
    from mnistsum_ray.training.preflight import preflight

    with Console() as console:
        run = preflight(config, partial(Progress, console.progress))
        with _on_cluster(console, str(run.config.name)):
            from mnistsum_ray.training import driver

            return driver.fit(run, console, callbacks)


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. Cluster, progress and errors are as in `fit`.

    With `strict` a RunError also says that some input cannot be used.
    """
    from mnistsum_ray.scoring.request import preflight

    with Console() as console:
        run = preflight(config, console)
        with _on_cluster(console, Path(run.output.path).name):
            from mnistsum_ray.scoring import driver

            return driver.score(run, console)


@contextmanager
def _on_cluster(console: Console, run: str) -> Iterator[None]:
    """Join a cluster or start one, whose advice the block hides: the console reports progress."""
    console.run = run
    console.say(connect())
    import_module("ray.data")  # sets the level of its logger
    with quiet_logger("ray", "ray.data"), warnings.catch_warnings():
        # Ray 2.60 has no other way to limit how often a process is started again.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        try:
            yield
        except RunError as error:
            if head_answers():
                raise
            raise TryAgainError(f"the head of the Ray cluster does not answer; {error}") from error
