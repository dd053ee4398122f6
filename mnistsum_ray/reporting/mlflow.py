"""Log a finished run to MLflow (`--mlflow URI`): config, metrics, files; and register the model."""

import os
import tempfile
from pathlib import Path
from typing import Any

import mlflow.onnx
import onnx
from mlflow.entities import Metric, Param, RunTag

from mnistsum_ray.export.model import export_onnx
from mnistsum_ray.model.folder import DESCRIPTION_FILE, WEIGHTS_FILE, load_model
from mnistsum_ray.reporting.report import (
    PICTURES,
    REPORT,
    epoch_metrics,
    epoch_seconds,
    split_metrics,
)
from mnistsum_ray.storage.store import Location


def log_run(
    manifest: dict[str, Any],
    history: list[dict[str, Any]],
    description: dict[str, Any],
    folder: Location,
) -> str:
    """Log a finished run, with files of its folder as artifacts; return its id in MLflow."""
    # MLflow's defaults are 7 retries of 120 s each, which would look like a run that hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    config = manifest["config"]
    # A client alone: the caller's own tracking URI and active run stay as they are.
    client = mlflow.MlflowClient(config["mlflow"])
    experiment = client.get_experiment_by_name(config["mlflow_experiment"])
    if experiment:
        experiment_id = experiment.experiment_id
    else:
        artifacts = _artifacts_of(config["mlflow"])
        experiment_id = client.create_experiment(config["mlflow_experiment"], artifacts)
    run = client.create_run(experiment_id, run_name=config["name"])
    run_id = str(run.info.run_id)
    params = [Param(key, str(value)) for key, value in config.items()]
    said = {f"data.{key}": manifest["data"][key] for key in ("source", "location", "sha256")}
    said |= manifest["versions"]
    tags = [RunTag(key, str(value)) for key, value in said.items()]
    client.log_batch(run_id, params=params, tags=tags)
    # The final metrics are of the published model, whose sum head was fine-tuned after its epoch.
    logged = [("epoch", epoch_metrics(entry), entry) for entry in history]
    logged.append(("final", split_metrics(description), history[-1]))
    for prefix, metrics, entry in logged:
        time = int(1000 * (entry["started"] + epoch_seconds(entry)))
        values = [Metric(f"{prefix}/{key}", metrics[key], time, entry["epoch"]) for key in metrics]
        client.log_batch(run_id, values)
    with tempfile.TemporaryDirectory() as copy:
        weights, model_json = f"model/{WEIGHTS_FILE}", f"model/{DESCRIPTION_FILE}"
        for name in (*PICTURES, REPORT, "history.jsonl", weights, model_json):
            Path(copy, name).parent.mkdir(exist_ok=True)
            Path(copy, name).write_bytes((folder / name).read_bytes())
        # ONNX holds no pickle. MLflow would find the requirements by running the model.
        model = onnx.load_from_string(export_onnx(load_model(folder)[0], description))
        packages = mlflow.onnx.get_default_pip_requirements()
        mlflow.onnx.save_model(
            model, f"{copy}/onnx", pip_requirements=packages, save_as_external_data=False
        )
        client.log_artifacts(run_id, copy)
    name = config["mlflow_model"]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/onnx", run_id)
    client.set_terminated(run_id)
    return run_id


def _artifacts_of(uri: str) -> str | None:
    """Where artifacts of a new experiment go: for SQLite beside its file, else as MLflow chooses.

    Its own choice would be the working folder, which Ray deletes after a submitted job.
    """
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
