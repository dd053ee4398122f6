"""The trained model in MLflow: logged in the ONNX flavour, which holds no pickle, and registered as a new version."""

import tempfile
from pathlib import Path
from typing import Any, Final

import mlflow.onnx
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from mnistsum_ray.model.exporting import INPUTS, OUTPUTS, export_onnx, export_torch
from mnistsum_ray.model.network import TwoHeadCNN

_SIGNATURE: Final = ModelSignature(
    Schema([TensorSpec(np.dtype(np.uint8), (-1, 28, 28), INPUTS[0]), TensorSpec(np.dtype(np.int64), (-1,), INPUTS[1])]),
    Schema([TensorSpec(np.dtype(dtype), (-1,), name) for name, dtype in zip(OUTPUTS, 2 * (np.int64, np.float32), strict=True)]),
)


def is_registered(client: MlflowClient, run_id: str) -> bool:
    """Return whether a version of a registered model comes from the run."""
    return len(client.search_model_versions(f"run_id = '{run_id}'")) > 0


def register_model(client: MlflowClient, run_id: str, name: str, model: TwoHeadCNN, card: dict[str, Any]) -> None:
    """Log a model to a run, and register it.

    `mlflow.onnx.log_model` would do so too, but needs the process's active run and its global tracking server.

    Args:
        client: of the tracking server.
        run_id: of the run.
        name: of the registered model, which is created if it does not exist; this model becomes its newest version.
        model: in evaluation mode, on the CPU.
        card: contents of model.json.
    """
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id, tags={"sha256": card["sha256"]})
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, card["epoch"])])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model")
        mlflow.onnx.save_model(
            onnx.load_from_string(export_onnx(export_torch(model))),
            target,
            mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
            signature=_SIGNATURE,
            pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # MLflow would find them by running the model
            save_as_external_data=False,
        )
        client.log_model_artifacts(logged.model_id, str(target))
    client.finalize_logged_model(logged.model_id, "READY")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not `models:/ID`, which the store would look up on the process's global tracking server.
    client.create_model_version(name, logged.artifact_location, run_id, model_id=logged.model_id)
