"""Python API of the jobs: train and score on a cluster."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import ScoreConfig, TrainConfig
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.results import ScoreResult, TrainResult

if TYPE_CHECKING:
    from ray.train import UserCallback


def fit(config: TrainConfig, callbacks: Sequence["UserCallback"] = ()) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or starts; that connection stays
    open. Progress goes to standard error.

    `callbacks` are `ray.train.UserCallback`s, which Ray Train calls in a process of its own. Each report, after an epoch, has the
    metrics `epoch`, `train_loss`, `validation` and `test`. What a callback raises counts as a failure.

    Raises:
        RequestError: the request is invalid; the message names the flag, which is the field, and says what to do.
        RunError: the run has begun and failed.
    """
    from mnistsum_ray.training.preflight import preflight

    with Console() as console:
        run = preflight(config, partial(Progress, console.progress))
        connect()

        from mnistsum_ray.training import driver

        with quiet_logger("ray", "ray.data"):  # the console reports progress; after the import of Ray Data, which sets its level
            return driver.fit(run, console, callbacks)


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. The cluster, the progress and the errors are those of `fit`.

    With `strict` a RunError also says that some input cannot be used.
    """
    from mnistsum_ray.scoring.request import preflight

    with Console() as console:
        run = preflight(config, console)
        connect()

        from mnistsum_ray.scoring import driver

        with quiet_logger("ray", "ray.data"):
            return driver.score(run, console)
