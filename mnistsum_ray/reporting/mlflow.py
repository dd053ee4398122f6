"""Log a finished run to MLflow (`--mlflow URI`): config, metrics, files; and register the model."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import mlflow.onnx
import onnx
from mlflow.entities import Metric, Param

from mnistsum_ray.export.onnx import export_onnx
from mnistsum_ray.model.folder import DESCRIPTION_FILE, WEIGHTS_FILE, load_model
from mnistsum_ray.overrides import default_environment
from mnistsum_ray.reporting.report import PICTURES, REPORT
from mnistsum_ray.storage.store import Location

NAME: Final = "mnistsum"
"""Name of the registered model, and of the experiment without MLFLOW_EXPERIMENT_NAME."""


# MLflow's defaults are 7 retries of 120 s each, which would look like a run that hangs.
@default_environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"})
def log_run(
    manifest: dict[str, Any],
    history: list[dict[str, Any]],
    description: dict[str, Any],
    folder: Location,
) -> str:
    """Log a finished run, with files of its folder as artifacts; return its id in MLflow."""
    config = manifest["config"]
    uri = config["mlflow"]
    # A client alone: the caller's own tracking URI and active run stay as they are.
    client = mlflow.MlflowClient(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", NAME)
    experiment = client.get_experiment_by_name(name)
    if experiment:
        experiment_id = experiment.experiment_id
    else:
        artifacts = None
        if uri.startswith("sqlite:///"):
            # MLflow would take the working folder, which Ray deletes after a submitted job.
            artifacts = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
        experiment_id = client.create_experiment(name, artifacts)
    run = client.create_run(experiment_id, run_name=config["name"])
    run_id = str(run.info.run_id)
    status = "FAILED"  # a run that nobody ends is shown as running for ever
    try:
        params = [Param(key, str(value)) for key, value in config.items()]
        client.log_batch(run_id, params=params)
        for entry in history:
            client.log_batch(run_id, _metrics("epoch", entry, entry["epoch"]))
        # Of the published model, whose sum head was fine-tuned after the last epoch.
        client.log_batch(run_id, _metrics("final", description, history[-1]["epoch"]))
        names = [name for name in PICTURES if (folder / name).status()]  # those that could be drawn
        names += [REPORT, "history.jsonl", "manifest.json"]
        names += [f"model/{WEIGHTS_FILE}", f"model/{DESCRIPTION_FILE}"]
        with tempfile.TemporaryDirectory() as copy:
            for name in names:
                Path(copy, name).parent.mkdir(exist_ok=True)
                Path(copy, name).write_bytes((folder / name).read_bytes())
            # ONNX holds no pickle. MLflow would find the requirements by running the model.
            model = onnx.load_from_string(export_onnx(load_model(folder)[0], description))
            packages = mlflow.onnx.get_default_pip_requirements()
            mlflow.onnx.save_model(
                model, f"{copy}/onnx", pip_requirements=packages, save_as_external_data=False
            )
            client.log_artifacts(run_id, copy)
        if not client.search_registered_models(f"name = '{NAME}'"):
            client.create_registered_model(NAME)
        client.create_model_version(NAME, f"{run.info.artifact_uri}/onnx", run_id)
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return run_id


def _metrics(prefix: str, line: dict[str, Any], epoch: int) -> list[Metric]:
    """Figures of a line of history.jsonl, or of model.json, e.g. `epoch/test/digit_accuracy`."""
    values = {"train/loss": line["train_loss"]} if "train_loss" in line else {}
    for split in ("validation", "test"):
        values |= {f"{split}/{name}": value for name, value in line[split].items()}
    now = int(1000 * time.time())
    return [Metric(f"{prefix}/{name}", value, now, epoch) for name, value in values.items()]
