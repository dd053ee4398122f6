"""TODO training.tracking"""

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
    """The run on the tracking server of `--mlflow`, which the manifest then names; it has failed if the block does."""
    told = _told_to_mlflow(run, manifest, console) if run.config.mlflow else None
    try:
        yield told
    except BaseException as error:
        if told:
            told.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _told_to_mlflow(run: TrainingRun, manifest: dict[str, Any], console: Console) -> "MLflowRun | None":
    from mnistsum_ray.reporting.mlflow import MLflowRun  # an extra

    config = run.config
    assert config.mlflow is not None
    assert config.name is not None
    stored = manifest.get("mlflow") if config.resume else None
    run_id = stored["run_id"] if stored and stored["uri"] == config.mlflow else None
    try:
        told = MLflowRun(config.mlflow, config.mlflow_experiment, config.name, run_id, manifest["config"])
    except RequestError as refusal:
        if not config.resume:
            raise
        console.say(f"{refusal}; going on without MLflow")
        return None
    manifest["mlflow"] = {"uri": config.mlflow, "run_id": told.run_id}
    return told
