"""Python API of the jobs: train and score on a cluster."""

from functools import partial

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import OnEpoch, ScoreConfig, TrainConfig
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.reporting.console import Console, Progress
from mnistsum_ray.reporting.results import ScoreResult, TrainResult


def fit(config: TrainConfig, on_epoch: OnEpoch | None = None) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or starts; that connection stays
    open. Progress goes to standard error.

    `on_epoch` gets each line of history.jsonl, a dict, when its epoch is finished; an epoch that is trained again after a failure
    comes again. It is called in a thread of its own, and the workers wait for it. What it raises ends the run, and `fit` raises
    it. If it returns True, as callbacks of XGBoost do, the run ends with a RunError, unless it was the last epoch. Either leaves
    a checkpoint of that epoch and no model: `resume` goes on, and gives the model of a run that was not ended.

    Raises:
        RequestError: the request is invalid; the message names the flag, which is the field, and says what to do.
        RunError: the run has begun and failed, or `on_epoch` stops it.
    """
    from mnistsum_ray.training.preflight import preflight

    with Console() as console:
        run = preflight(config, partial(Progress, console.progress))
        connect()

        from mnistsum_ray.training import driver

        with quiet_logger("ray", "ray.data"):  # the console reports progress; after the import of Ray Data, which sets its level
            return driver.fit(run, console, on_epoch)


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. The cluster, the progress and the errors are those of `fit`.

    With `strict` a RunError also says that some input cannot be used.
    """
    from mnistsum_ray.scoring.preflight import preflight

    with Console() as console:
        run = preflight(config)
        connect()

        from mnistsum_ray.scoring import driver

        with quiet_logger("ray", "ray.data"):
            return driver.score(run, console)
