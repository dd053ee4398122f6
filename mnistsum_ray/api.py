"""Python API of the jobs: train and score on a cluster."""

import base64
import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import Thread
from typing import Any

from mnistsum_ray.cluster.connection import connect
from mnistsum_ray.config import JobConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.overrides import quiet_logger
from mnistsum_ray.reporting.console import Console, Progress, accuracies
from mnistsum_ray.storage.paths import locate


@dataclass(frozen=True)
class SplitRows:
    """Rows of each split, and where they come from."""

    source: str
    """`sample`, `mnist` or `parquet`."""
    train_rows: int
    validation_rows: int
    test_rows: int


@dataclass(frozen=True)
class HeldOutMetrics:
    """Quality on the test rows, with every number 0..9 for each image. Accuracies are in 0..1."""

    rows: int
    pairs: int
    """Ten for each row."""
    loss: float
    """Mean of the heads' cross-entropies, in nats."""
    digit_accuracy: float
    sum_accuracy: float


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training."""

    run: str
    """Run folder, or its URI."""
    model: str
    """Model folder, or its URI."""
    parameters: int
    data: SplitRows
    test: HeldOutMetrics
    images_per_second: float
    """Training rows per second without the first epoch, unless it is the only one."""
    seconds: float
    mlflow: str | None = None
    """Id of the MLflow run."""

    def _repr_html_(self) -> str | None:
        right = f"{accuracies(vars(self.test))} of {self.test.rows:,} test rows, all ten numbers"
        return _with_picture(f"{self.run}: {right}; {self.seconds:.0f} s", self.run, "mistakes.png")


@dataclass(frozen=True)
class ScoreResult:
    """Result of a finished scoring. input_rows = scored_rows + rejected_rows, over the files that can be read."""

    output: str
    """Output folder, or its URI."""
    input_rows: int
    scored_rows: int
    rejected_rows: int
    resumed_rows: int
    """Rows of those that an earlier run had committed."""
    files: int
    failed_files: int
    rows_per_second: float
    seconds: float
    set_aside: bool
    """Whether this run rejected rows or left out files, besides those that an earlier run had set aside."""
    digit_accuracy: float | None = None
    """Accuracies in 0..1; None without a labelled row."""
    sum_accuracy: float | None = None

    def _repr_html_(self) -> str | None:
        rows = f"{self.scored_rows:,} of {self.input_rows:,} rows scored, {self.rejected_rows:,} rejected"
        right = f"; {accuracies(vars(self))}" if self.digit_accuracy is not None else ""
        return _with_picture(f"{self.output}: {rows}{right}; {self.seconds:.0f} s", self.output, "probabilities.png")

    @property
    def complete(self) -> bool:
        """Whether every row of every file was scored."""
        return not self.rejected_rows and not self.failed_files


def fit(config: TrainConfig) -> TrainResult:
    """Train a model, as `mnistsum train` does.

    Runs on the cluster that this process is connected to, else on the one that `connect` joins or starts; that connection stays
    open. Progress goes to standard error. Call it in the main thread: only there can a run be stopped early, as after an infinite
    loss.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed.
    """
    with _naming_arguments(config):
        line = run_training(config)
    return TrainResult(**line | {"data": SplitRows(**line["data"]), "test": HeldOutMetrics(**line["test"])})


def score(config: ScoreConfig) -> ScoreResult:
    """Score Parquet files, as `mnistsum score` does. The cluster and the progress are those of `fit`.

    Raises:
        RequestError: the request is invalid; the message says why and what to do.
        RunError: the run has begun and failed, or with `strict` some input cannot be used.
    """
    with _naming_arguments(config):
        line, set_aside = run_scoring(config)
    return ScoreResult(**line, set_aside=set_aside)


def run_training(config: TrainConfig) -> dict[str, Any]:
    """Train; return the fields of the job's last line. Errors name the flags of the shell."""
    from mnistsum_ray.training.preflight import preflight

    with Console() as console:
        run = preflight(config, partial(Progress, console.progress))
        torch_import = Thread(target=import_module, args=("torch",))  # takes seconds, and to start Ray is mostly to wait
        torch_import.start()
        try:
            connect({"job_name": f"train {run.config.name}", "run": run.folder.display})
        finally:
            torch_import.join()  # a process that ended in the middle of an import would crash

        from mnistsum_ray.cluster.gpus import begin_probe

        probe = begin_probe(run.config.use_gpu)  # while this process imports Ray Train
        from mnistsum_ray.training import driver

        with quiet_logger("ray", "ray.data"):  # the console reports progress; after the import of Ray Data, which sets its level
            return driver.fit(run, console, probe)


def run_scoring(config: ScoreConfig) -> tuple[dict[str, Any], bool]:
    """Score; return the fields of the job's last line, and `ScoreResult.set_aside`. Errors name the flags of the shell."""
    from mnistsum_ray.scoring.preflight import preflight

    with Console() as console:
        run = preflight(config)
        metadata = {"job_name": f"score {run.output.display}", "model": run.model.display, "output": run.output.display}
        connect(metadata)  # `preflight` has imported torch

        from mnistsum_ray.cluster.gpus import begin_probe

        probe = begin_probe(False if config.precision == "int8" else config.use_gpu)  # while this process imports Ray Data
        from mnistsum_ray.scoring import driver

        with quiet_logger("ray", "ray.data"):
            return driver.score(run, console, probe)


def _with_picture(text: str, folder: str, picture: str) -> str | None:
    """HTML of a text and a picture of a run's report; None, for which a notebook shows the fields, without the picture."""
    try:
        png = base64.b64encode((locate(folder, "run") / picture).read_bytes()).decode()
    except (OSError, ValueError):  # it is deleted, or its storage does not answer or takes other credentials
        return None
    return f'<p>{html.escape(text)}</p><img alt="{picture}" style="max-width: 100%" src="data:image/png;base64,{png}">'


@contextmanager
def _naming_arguments(config: JobConfig) -> Iterator[None]:
    """Have RequestErrors name arguments where they name flags of this config: `max_rows_per_file` for `--max-rows-per-file`.

    Other dashes stay as they are: in a path, or in a flag of Ray.
    """
    flags = "|".join(field.replace("_", "-") for field in type(config).model_fields)
    try:
        yield
    except RequestError as error:
        text = re.sub(rf"(?<![^\s(])--({flags})(?![\w-])", lambda flag: flag[1].replace("-", "_"), str(error))
        raise RequestError(text) from error
