"""Log a finished run to MLflow (`--mlflow URI`): config, metrics, files; and register the model."""

import tempfile
from pathlib import Path
from typing import Any

import mlflow.onnx
import onnx
from mlflow.entities import Metric, Param, RunTag

from mnistsum_ray.export.model import export_onnx
from mnistsum_ray.model.folder import load_model
from mnistsum_ray.overrides import default_environment, quiet_logger
from mnistsum_ray.reporting.report import epoch_end, epoch_scalars, scores
from mnistsum_ray.storage.store import Location


# MLflow's defaults are 7 retries of 120 s each, which would look like a run that hangs.
@default_environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"})
@quiet_logger("mlflow", "alembic")
def log_run(
    manifest: dict[str, Any], history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str]
) -> str:
    """Log a finished run, with `files` of its folder as artifacts; return its id in MLflow."""
    config, data, uri = manifest["config"], manifest["data"], manifest["config"]["mlflow"]
    # A client alone: the caller's own tracking URI and active run stay as they are.
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(config["mlflow_experiment"])
    if experiment is None:
        # MLflow's own choice is in the working folder, which Ray deletes after a submitted job.
        local = uri.startswith("sqlite:///")
        artifacts = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri() if local else None
        experiment = client.get_experiment(client.create_experiment(config["mlflow_experiment"], artifacts))
    run = client.create_run(experiment.experiment_id, run_name=config["name"])
    run_id = str(run.info.run_id)
    tags = {f"data.{key}": data[key] for key in ("source", "location", "sha256")} | manifest["versions"]
    params = [Param(key, str(value)) for key, value in config.items()]
    client.log_batch(run_id, params=params, tags=[RunTag(key, str(value)) for key, value in tags.items()])
    logged = [(epoch_scalars(entry), entry) for entry in history]
    logged.append((scores(card, "final"), history[-1]))
    for scalars, entry in logged:
        milliseconds = int(1000 * epoch_end(entry))
        metrics = [Metric(key, value, milliseconds, entry["epoch"]) for key, value in scalars.items()]
        client.log_batch(run_id, metrics)
    with tempfile.TemporaryDirectory() as copy:
        for name in files:
            Path(copy, name).parent.mkdir(exist_ok=True)
            Path(copy, name).write_bytes((folder / name).read_bytes())
        # ONNX holds no pickle. MLflow would find the requirements by running the model.
        model = onnx.load_from_string(export_onnx(load_model(folder)[0], card))
        packages = mlflow.onnx.get_default_pip_requirements()
        mlflow.onnx.save_model(model, f"{copy}/onnx", pip_requirements=packages, save_as_external_data=False)
        client.log_artifacts(run_id, copy)
    name = config["mlflow_model"]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    client.create_model_version(name, f"{run.info.artifact_uri}/onnx", run_id)
    client.set_terminated(run_id)
    return run_id
