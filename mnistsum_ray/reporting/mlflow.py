"""Log a finished run to MLflow (`--mlflow URI`): config, metrics of each epoch, pictures and files; and register the model.

The run folder is the record, and MLflow holds a copy. A run that could not be logged is logged later, each epoch once.
"""

import os
import shlex
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import mlflow
import numpy as np
from mlflow.models import infer_signature

from mnistsum_ray.errors import lines_of
from mnistsum_ray.export.model import INPUTS, OUTPUTS, export_onnx
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.overrides import default_environment, quiet_logger
from mnistsum_ray.reporting.report import epoch_end, epoch_scalars, model_scalars
from mnistsum_ray.storage.location import Location

_ENVIRONMENT: Final = {
    # MLflow's defaults are 7 retries of 120 s each: an unreachable server would look like a run that hangs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # `log_run` says where the run is
}

Say = Callable[[str], None]


def log_run(
    manifest: dict[str, Any], history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str], say: Say
) -> str | None:
    """Log a finished run, with `files` of its folder as artifacts; return its id in MLflow, or None after a console line if any
    of it fails.

    The manifest's entry `mlflow`, {uri, run_id}, is set as soon as MLflow knows the run. One of the same URI is continued.
    """
    uri = manifest["config"]["mlflow"]
    before = os.environ.get("MLFLOW_TRACKING_URI")  # `set_tracking_uri` sets it too
    # MLflow and alembic log a line for each table of a new local store.
    with default_environment(_ENVIRONMENT), quiet_logger("mlflow", "alembic"):
        try:
            mlflow.set_tracking_uri(uri)
            with ThreadPoolExecutor(1) as thread:  # MLflow's active run is that of a thread: the caller's own stays active
                return thread.submit(_log, manifest, history, card, folder, files, say).result()
        except Exception as error:  # from the network to a missing client of the server's storage
            say(f"--mlflow {uri}: {lines_of(error)[0]}; the run is complete, the same command with --resume logs it again")
            return None
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def _log(
    manifest: dict[str, Any], history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str], say: Say
) -> str:
    client, config = mlflow.MlflowClient(), manifest["config"]
    uri, stored = config["mlflow"], manifest.get("mlflow", {})
    with mlflow.start_run(stored["run_id"]) if stored.get("uri") == uri else _new_run(client, config) as run:
        manifest["mlflow"] = {"uri": uri, "run_id": (run_id := run.info.run_id)}
        if not run.data.params:
            versions = manifest["versions"]
            tags = {f"version.{package}": number for package, number in versions.items()}
            tags |= {f"data.{key}": manifest["data"][key] for key in ("source", "location", "sha256")}
            mlflow.set_tags(tags | ({"mlflow.source.git.commit": versions["commit"]} if "commit" in versions else {}))
            mlflow.log_params(config)
        logged = {metric.step for metric in client.get_metric_history(run_id, "epoch/train/loss")}
        for entry in history:
            if entry["epoch"] not in logged:
                # One request, so that MLflow has either all metrics of an epoch or none.
                mlflow.log_metrics(epoch_scalars(entry), entry["epoch"], timestamp=int(1000 * epoch_end(entry)))
        scores = model_scalars(card)
        if not client.get_metric_history(run_id, list(scores)[-1]):
            mlflow.log_metrics(scores, history[-1]["epoch"])
        with tempfile.TemporaryDirectory() as copy:
            for name in files:
                Path(copy, name).parent.mkdir(exist_ok=True)
                Path(copy, name).write_bytes((folder / name).read_bytes())
            mlflow.log_artifacts(copy)
        if not client.search_model_versions(f"run_id = '{run_id}'"):
            say(f"registering the model in MLflow as {config['mlflow_model']}")
            _register(config["mlflow_model"], folder, card)
    page = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    say(f"MLflow: {f'mlflow ui --backend-store-uri {shlex.quote(uri)}' if uri.startswith('sqlite:') else page}")
    return str(run_id)


def _new_run(client: mlflow.MlflowClient, config: dict[str, Any]) -> mlflow.ActiveRun:
    """Start a run in the experiment of the config, which is created if it does not exist."""
    uri, name = config["mlflow"], config["mlflow_experiment"]
    # MLflow's default for the files of a local store is `mlruns` in the working folder, wherever that is. A server chooses.
    database = Path(uri.removeprefix("sqlite:///")).resolve()
    files = (database.parent / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    found = client.get_experiment_by_name(name)
    return mlflow.start_run(
        experiment_id=found.experiment_id if found else client.create_experiment(name, files), run_name=config["name"]
    )


def _register(name: str, folder: Location, card: dict[str, Any]) -> None:
    """Log the model in the ONNX flavour, which holds no pickle, and register it as a new version."""
    import mlflow.onnx  # slow to import
    import onnx

    model, description = load_model(folder)
    inputs = np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64)
    outputs = len(HEADS) * (np.zeros(1, np.int64), np.zeros(1, np.float32))
    mlflow.onnx.log_model(
        onnx.load_from_string(export_onnx(model, description)),
        name="onnx",
        registered_model_name=name,
        signature=infer_signature(dict(zip(INPUTS, inputs, strict=True)), dict(zip(OUTPUTS, outputs, strict=True))),
        pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # MLflow would find them by running the model
        save_as_external_data=False,
        tags={"sha256": card["sha256"]},
        step=card["epoch"],
    )
