"""Log a run to MLflow (`--mlflow URI`): config, metrics of each epoch, pictures and files; and register the model.

The run folder is the record, and MLflow holds a copy. What cannot be logged while the server is unreachable is logged later,
each epoch once.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from mnistsum_ray.errors import RequestError
from mnistsum_ray.model.serialization import load_model
from mnistsum_ray.overrides import default_environment, quiet_logger
from mnistsum_ray.reporting.report import epoch_scalars, model_scalars
from mnistsum_ray.storage.location import Location

_FIRST_METRIC: Final = "train/loss"
_DIGEST_CHARACTERS: Final = 36
"""The longest digest that MLflow takes."""

_LAST_METRIC: Final = "model/test/sum_accuracy"

_HTTP_LIMITS: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's defaults are 7 retries of 120 s each: an unreachable server would look like a training that hangs."""


class MLflowRun:
    """One run on a tracking server or in a local store.

    Errors while logging, from the network to a missing client of the server's storage, become console lines; training goes on.
    """

    def __init__(self, uri: str, experiment: str, name: str, run_id: str | None, manifest: dict[str, Any]) -> None:
        """Create a run, or continue `run_id`.

        Args:
            uri: of the server or the store.
            experiment: created if it does not exist.
            name: of the run.
            run_id: of a run that is continued.
            manifest: of the starting run; its config become parameters, its versions tags, and its data the run's dataset.

        Raises:
            RequestError: the server, the store or the run does not exist.
        """
        try:
            self._client = MlflowClient(uri)
            if run_id is None:
                found = self._client.get_experiment_by_name(experiment)
                experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
                run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
                params = [Param(key, str(value)) for key, value in manifest["config"].items()]
                tags = [RunTag(f"version.{package}", number) for package, number in manifest["versions"].items()]
                if "commit" in manifest["versions"]:
                    tags.append(RunTag(MLFLOW_GIT_COMMIT, manifest["versions"]["commit"]))
                self._client.log_batch(run_id, params=params, tags=tags)
                self._client.log_inputs(run_id, [_dataset(manifest["data"])])
            else:
                self._client.update_run(run_id, status="RUNNING")
            logged = self._client.get_metric_history(run_id, _FIRST_METRIC)
        except Exception as error:
            raise RequestError(f"--mlflow {uri}: {_first_line(error)}") from None
        self.run_id: str = run_id
        self._uri = uri
        self._model_name = manifest["config"]["mlflow_model"]
        self._logged_epochs = {metric.step for metric in logged}
        self._failed = False
        self._thread = ThreadPoolExecutor(1)  # training must not wait for a server that does not answer

    def log_epoch(self, entry: dict[str, Any], say: Callable[[str], None]) -> None:
        """Log a line of history.jsonl in the background; the first failure writes a console line."""
        self._thread.submit(self._try_to_log, entry, say)

    def _try_to_log(self, entry: dict[str, Any], say: Callable[[str], None]) -> None:
        try:
            self._log_epoch(entry)
        except Exception as error:
            if not self._failed:
                say(f"--mlflow {self._uri}: {_first_line(error)}; training goes on, and the epoch is logged later")
            self._failed = True

    def _log_epoch(self, entry: dict[str, Any]) -> None:
        epoch = entry["epoch"]
        if epoch in self._logged_epochs:
            return
        ended = int(1000 * (entry["started"] + entry["seconds"] + entry["evaluation_seconds"]))
        # One request, so that MLflow has either all metrics of an epoch or none.
        self._client.log_batch(self.run_id, [Metric(key, value, ended, epoch) for key, value in epoch_scalars(entry).items()])
        self._logged_epochs.add(epoch)

    def finish(
        self, history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str], say: Callable[[str], None]
    ) -> bool:
        """Log missing epochs, the model's metrics (`card`: model.json) and `files` of the run folder, end the run, and register
        the model.

        Returns:
            False, after a console line, if any of it fails.
        """
        self._thread.shutdown(cancel_futures=True)
        try:
            for entry in history:
                self._log_epoch(entry)
            ended = int(1000 * time.time())
            if not self._client.get_metric_history(self.run_id, _LAST_METRIC):
                scores = [Metric(key, value, ended, history[-1]["epoch"]) for key, value in model_scalars(card).items()]
                self._client.log_batch(self.run_id, scores)
            for name in files:
                self._log_file(folder / name, name.rpartition("/")[0])
            self._client.set_terminated(self.run_id, end_time=ended)
            self._register(card, folder, say)
        except Exception as error:
            say(f"--mlflow {self._uri}: {_first_line(error)}; the run is complete, the same command with --resume logs it again")
            return False
        return True

    def _register(self, card: dict[str, Any], folder: Location, say: Callable[[str], None]) -> None:
        from mnistsum_ray.reporting.mlflow_model import is_registered, register_model  # imports onnx, needed once, at the end

        if not is_registered(self._client, self.run_id):
            say(f"registering the model in MLflow as {self._model_name}")
            register_model(self._client, self.run_id, self._model_name, load_model(folder)[0], card["sha256"], card["epoch"])

    def _log_file(self, file: Location, artifact_folder: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            local = Path(name, file.path.rpartition("/")[2])
            local.write_bytes(file.read_bytes())
            self._client.log_artifact(self.run_id, str(local), artifact_folder or None)

    def end(self, status: str) -> None:
        """End the run with the status `FAILED` or `KILLED`, if the server answers."""
        self._thread.shutdown(cancel_futures=True)
        with suppress(Exception):
            self._client.set_terminated(self.run_id, status=status)


def _dataset(data: dict[str, Any]) -> DatasetInput:
    """The training data: name, place, rows, and as digest the start of their SHA-256."""
    rows = {key: data[key] for key in ("train_rows", "validation_rows", "test_rows")}
    source = json.dumps({"uri": data["location"]})
    dataset = Dataset(data["source"], data["sha256"][:_DIGEST_CHARACTERS], "uri", source, profile=json.dumps(rows))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


@contextmanager
def mlflow_settings() -> Iterator[None]:
    """Limit MLflow's HTTP retries and hide its log lines while the block runs; variables that the user has set stay.

    For the whole run, and not for each call: the environment belongs to all threads.
    """
    # mlflow and alembic log a line for each table of a new local store.
    with default_environment(_HTTP_LIMITS), quiet_logger("mlflow", "alembic"):
        yield


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
