"""Log a run to MLflow (`--mlflow URI`): config, metrics of each epoch, pictures and files; and register the model.

The run folder is the record, and MLflow holds a copy. What cannot be logged while the server is unreachable is logged later,
each epoch once.
"""

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mnistsum_ray.errors import RequestError, lines_of
from mnistsum_ray.export.model import INPUTS, OUTPUTS, export_onnx, export_torch
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.overrides import default_environment, quiet_logger
from mnistsum_ray.reporting.report import epoch_end, epoch_scalars, model_scalars
from mnistsum_ray.storage.location import Location

_ENVIRONMENT: Final = {
    # MLflow's defaults are 7 retries of 120 s each: an unreachable server would look like a training that hangs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # `finish` says where the run is
}

_ARTIFACTS: Final = "mlartifacts"
"""Folder of a local store's files, beside its database. MLflow's default is `mlruns` in the working folder, wherever that is."""

_DIGEST_CHARACTERS: Final = 36
"""The longest digest that MLflow takes."""

Say = Callable[[str], None]
"""Writes a console line."""


@contextmanager
def track(uri: str, experiment: str, name: str, run_id: str | None, manifest: dict[str, Any]) -> Iterator["MLflowRun"]:
    """Create a run, or continue `run_id`; if the block raises, the run ends with the status FAILED or KILLED.

    Args:
        uri: of the server or the store.
        experiment: created if it does not exist.
        name: of the run.
        run_id: of a run that is continued.
        manifest: of the starting run; its config become parameters, its versions tags, and its data the run's dataset.

    Raises:
        RequestError: the server, the store or the run does not exist.
    """
    # For the whole run, and not for each call: all of these belong to all threads. Variables that the user has set stay.
    # MLflow and alembic log a line for each table of a new local store.
    before = os.environ.get("MLFLOW_TRACKING_URI")  # `set_tracking_uri` sets it too
    with default_environment(_ENVIRONMENT), quiet_logger("mlflow", "alembic"):
        try:
            run = MLflowRun(uri, experiment, name, run_id, manifest)
            try:
                yield run
            except BaseException as error:
                run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


class MLflowRun:
    """One run on a tracking server or in a local store.

    Errors while logging, from the network to a missing client of the server's storage, become console lines; training goes on.
    """

    def __init__(self, uri: str, experiment: str, name: str, run_id: str | None, manifest: dict[str, Any]) -> None:
        """See `track`."""
        self._uri, self._model_name = uri, manifest["config"]["mlflow_model"]
        self._failed = self._ending = False
        # One thread calls MLflow. Its active run is that thread's, so one that the caller has stays active; and training does
        # not wait for a server that does not answer. MLflow's own queue would write an error for each epoch.
        self._thread = ThreadPoolExecutor(1)
        try:
            self.run_id = self._thread.submit(self._start, experiment, name, run_id, manifest).result()
        except Exception as error:
            raise RequestError(f"--mlflow {uri}: {lines_of(error)[0]}") from None

    def _start(self, experiment: str, name: str, run_id: str | None, manifest: dict[str, Any]) -> str:
        mlflow.set_tracking_uri(self._uri)
        if run_id is None:
            found = mlflow.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else mlflow.create_experiment(experiment, self._artifact_location())
            run_id = mlflow.start_run(experiment_id=experiment_id, run_name=name).info.run_id
            versions = manifest["versions"]
            mlflow.log_params(manifest["config"])
            mlflow.set_tags({f"version.{package}": number for package, number in versions.items()})
            mlflow.set_tags({"mlflow.source.git.commit": versions["commit"]} if "commit" in versions else {})
            mlflow.MlflowClient().log_inputs(run_id, [_dataset(manifest["data"])])
        else:
            mlflow.start_run(run_id)
        self._logged_epochs = {metric.step for metric in mlflow.MlflowClient().get_metric_history(run_id, "epoch/train/loss")}
        return run_id

    def _artifact_location(self) -> str | None:
        """Place of the files of a new experiment; None: a server chooses it."""
        database = self._uri.removeprefix("sqlite:///")
        return None if database == self._uri else (Path(database).resolve().parent / _ARTIFACTS).as_uri()

    def _address(self) -> str:
        """Address of the run's page on a server, or the command that starts one on a local store."""
        if self._uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}"
        experiment_id = mlflow.MlflowClient().get_run(self.run_id).info.experiment_id
        return f"{self._uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def log_epoch(self, entry: dict[str, Any], say: Say) -> None:
        """Log a line of history.jsonl in the background; the first failure writes a console line."""

        def log() -> None:
            try:
                if not self._ending:
                    self._log_epoch(entry)
            except Exception as error:
                if not self._failed:
                    say(f"--mlflow {self._uri}: {lines_of(error)[0]}; training goes on, and the epoch is logged later")
                self._failed = True

        self._thread.submit(log)

    def _log_epoch(self, entry: dict[str, Any]) -> None:
        if entry["epoch"] not in self._logged_epochs:
            # One request, so that MLflow has either all metrics of an epoch or none.
            mlflow.log_metrics(epoch_scalars(entry), entry["epoch"], timestamp=int(1000 * epoch_end(entry)))
            self._logged_epochs.add(entry["epoch"])

    def finish(self, history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str], say: Say) -> bool:
        """Log missing epochs, the model's metrics (`card`: model.json) and `files` of the run folder, register the model, and
        end the run.

        Returns:
            False, after a console line, if any of it fails.
        """

        def log_rest() -> None:
            client, scores = mlflow.MlflowClient(), model_scalars(card)
            for entry in history:
                self._log_epoch(entry)
            if not client.get_metric_history(self.run_id, list(scores)[-1]):
                mlflow.log_metrics(scores, history[-1]["epoch"])
            with tempfile.TemporaryDirectory() as copy:
                for name in files:
                    Path(copy, name).parent.mkdir(exist_ok=True)
                    Path(copy, name).write_bytes((folder / name).read_bytes())
                mlflow.log_artifacts(copy)
            if not client.search_model_versions(f"run_id = '{self.run_id}'"):
                say(f"registering the model in MLflow as {self._model_name}")
                self._register(folder, card)
            say(f"MLflow: {self._address()}")

        self._ending = True  # epochs that wait are logged with the rest
        try:
            self._thread.submit(log_rest).result()
            return True
        except Exception as error:
            say(f"--mlflow {self._uri}: {lines_of(error)[0]}; the run is complete, the same command with --resume logs it again")
            return False
        finally:
            self.end("FINISHED")

    def _register(self, folder: Location, card: dict[str, Any]) -> None:
        """Log the model in the ONNX flavour, which holds no pickle, and register it as a new version."""
        import mlflow.onnx  # slow to import, and needed once
        import onnx

        def vector(dtype: type[np.generic], name: str) -> TensorSpec:
            return TensorSpec(np.dtype(dtype), (-1,), name)

        images = TensorSpec(np.dtype(np.uint8), (-1, 28, 28), INPUTS[0])
        answers = map(vector, len(HEADS) * (np.int64, np.float32), OUTPUTS)
        model, description = load_model(folder)
        mlflow.onnx.log_model(
            onnx.load_from_string(export_onnx(export_torch(model), description)),
            name="onnx",
            registered_model_name=self._model_name,
            signature=ModelSignature(Schema([images, vector(np.int64, INPUTS[1])]), Schema(list(answers))),
            pip_requirements=mlflow.onnx.get_default_pip_requirements(),  # MLflow would find them by running the model
            save_as_external_data=False,
            tags={"sha256": card["sha256"]},
            step=card["epoch"],
        )

    def end(self, status: str) -> None:
        """End the run with the status `FINISHED`, `FAILED` or `KILLED`, if the server answers."""
        self._ending = True
        with suppress(Exception):
            self._thread.submit(mlflow.end_run, status).result()


def _dataset(data: dict[str, Any]) -> DatasetInput:
    """The training data: name, place, rows, and as digest the start of their SHA-256, which is not known of streamed rows."""
    rows = {key: data[key] for key in ("train_rows", "validation_rows", "test_rows")}
    source, digest = json.dumps({"uri": data["location"]}), (data["sha256"] or "unknown")[:_DIGEST_CHARACTERS]
    return DatasetInput(
        Dataset(data["source"], digest, "uri", source, profile=json.dumps(rows)), [InputTag("mlflow.data.context", "training")]
    )
