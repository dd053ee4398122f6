"""The trained model in MLflow: logged in the ONNX flavour, which holds no pickle, and registered as a new version."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import mlflow.onnx
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from mnistsum_ray.model.exporting import INPUTS, OUTPUTS, export_onnx, export_torch
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import TwoHeadCNN

_NAME: Final = "onnx"
"""Name of the logged model: MLflow allows fewer characters in it than in that of a registered model, and it must not be that of
a folder among the run's files."""

_SIGNATURE: Final = ModelSignature(
    Schema([TensorSpec(np.dtype(np.uint8), (-1, 28, 28), INPUTS[0]), TensorSpec(np.dtype(np.int64), (-1,), INPUTS[1])]),
    Schema(
        [
            TensorSpec(np.dtype(dtype), (-1,), name)
            for name, dtype in zip(OUTPUTS, len(HEADS) * (np.int64, np.float32), strict=True)
        ]
    ),
)


def is_registered(client: MlflowClient, run_id: str) -> bool:
    """Return whether a version of a registered model comes from the run."""
    return len(client.search_model_versions(f"run_id = '{run_id}'")) > 0


def register_model(client: MlflowClient, run_id: str, name: str, model: TwoHeadCNN, sha256: str, epoch: int) -> None:
    """Log a model to a run, where that has not been done, and register it.

    `mlflow.onnx.log_model` would do so too, but needs the process's active run and its global tracking server.

    Args:
        client: of the tracking server.
        run_id: of the run.
        name: of the registered model, which is created if it does not exist; this model becomes its newest version.
        model: in evaluation mode, on the CPU.
        sha256: of its weights.
        epoch: that it is from.
    """
    logged = _logged_model(client, run_id, sha256) or _log_model(client, run_id, model, sha256, epoch)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not `models:/ID`, which the store would look up on the process's global tracking server.
    client.create_model_version(name, logged.artifact_location, run_id, model_id=logged.model_id)


def _logged_model(client: MlflowClient, run_id: str, sha256: str) -> LoggedModel | None:
    """The run's logged model with these weights: an earlier attempt may have failed after it."""
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in outputs.model_outputs] if outputs else []
    return next((model for model in models if model.tags.get("sha256") == sha256), None)


def _log_model(client: MlflowClient, run_id: str, model: TwoHeadCNN, sha256: str, epoch: int) -> LoggedModel:
    exported = onnx.load_from_string(export_onnx(export_torch(model)))
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name=_NAME, source_run_id=run_id, tags={"sha256": sha256})
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "model")
            mlflow.onnx.save_model(
                exported,
                target,
                mlflow_model=Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id),
                signature=_SIGNATURE,
                pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # MLflow would find them by running the model
                save_as_external_data=False,
            )
            client.log_model_artifacts(logged.model_id, str(target))
        client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, epoch)])
    return logged
