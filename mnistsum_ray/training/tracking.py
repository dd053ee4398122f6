"""MLflow run of a training (`--mlflow`), from start to end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mnistsum_ray.errors import RequestError
from mnistsum_ray.reporting.console import Console
from mnistsum_ray.training.preflight import TrainingRun

if TYPE_CHECKING:
    from mnistsum_ray.reporting.mlflow import MLflowRun


@contextmanager
def mlflow_run(run: TrainingRun, manifest: dict[str, Any], console: Console) -> Iterator["MLflowRun | None"]:
    """The run's MLflow counterpart, or None without `--mlflow`; it gets the status FAILED or KILLED if the block raises.

    The manifest gets an entry `mlflow` with the server's URI and the run id.
    """
    if not run.config.mlflow:
        yield None
        return
    from mnistsum_ray.reporting.mlflow import mlflow_settings  # needs the extra `mlflow`

    with mlflow_settings():
        tracked = _start(run, manifest, console)
        try:
            yield tracked
        except BaseException as error:
            if tracked:
                tracked.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise


def _start(run: TrainingRun, manifest: dict[str, Any], console: Console) -> "MLflowRun | None":
    from mnistsum_ray.reporting.mlflow import MLflowRun  # needs the extra `mlflow`

    config = run.config
    assert config.mlflow is not None
    assert config.name is not None
    stored = manifest.get("mlflow") if config.resume else None
    run_id = stored["run_id"] if stored and stored["uri"] == config.mlflow else None
    try:
        tracked = MLflowRun(config.mlflow, config.mlflow_experiment, config.name, run_id, manifest)
    except RequestError as error:
        if not config.resume:
            raise
        console.say(f"{error}; going on without MLflow")
        return None
    manifest["mlflow"] = {"uri": config.mlflow, "run_id": tracked.run_id}
    return tracked
