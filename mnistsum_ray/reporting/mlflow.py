"""A run told to MLflow, with `--mlflow URI`: settings, metrics of each epoch, pictures, the model.

The run folder is what counts. What MLflow could not be told while it did not answer it is told later, an epoch never twice.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from mnistsum_ray.errors import RequestError
from mnistsum_ray.reporting.report import model_scalars, scalars
from mnistsum_ray.storage.location import Location

_FIRST_METRIC: Final = "train/loss"
_LAST_METRIC: Final = "model/test/sum_accuracy"

# MLflow's own are 7 tries of 120 s each, in which training would seem to hang.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

# It tells of each table that it makes in a local store.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class MLflowRun:
    """One run on a tracking server, or in a local store.

    Whatever is raised here, from the network to a missing client of the storage behind the server, is said and costs no training.
    """

    def __init__(self, uri: str, experiment: str, name: str, run_id: str | None, settings: dict[str, Any]) -> None:
        """Make a run, or go on with `run_id`.

        Raises:
            RequestError: there is no such server, store or run.
        """
        try:
            self._client = MlflowClient(uri)
            if run_id is None:
                found = self._client.get_experiment_by_name(experiment)
                experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
                run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
                params = [Param(key, str(value)) for key, value in settings.items()]
                self._client.log_batch(run_id, params=params)
            else:
                self._client.update_run(run_id, status="RUNNING")
            told = self._client.get_metric_history(run_id, _FIRST_METRIC)
        except Exception as error:
            raise RequestError(f"--mlflow {uri}: {_line(error)}") from None
        self.run_id: str = run_id
        self._uri = uri
        self._told = {metric.step for metric in told}
        self._silent = False
        self._thread = ThreadPoolExecutor(1)  # a server that does not answer must hold up nobody

    def tell(self, entry: dict[str, Any], say: Callable[[str], None]) -> None:
        """Log a line of history.jsonl, soon; where that fails, say so once."""
        self._thread.submit(self._try_to_tell, entry, say)

    def _try_to_tell(self, entry: dict[str, Any], say: Callable[[str], None]) -> None:
        try:
            self._tell(entry)
        except Exception as error:
            if not self._silent:
                say(f"--mlflow {self._uri}: {_line(error)}; training goes on, and it is told later")
            self._silent = True

    def _tell(self, entry: dict[str, Any]) -> None:
        epoch = entry["epoch"]
        if epoch in self._told:
            return
        ended = int(1000 * (entry["started"] + entry["seconds"] + entry["evaluation_seconds"]))
        # In one request, so that an epoch is there with all of its metrics or not at all.
        self._client.log_batch(self.run_id, [Metric(key, value, ended, epoch) for key, value in scalars(entry).items()])
        self._told.add(epoch)

    def finish(
        self, history: list[dict[str, Any]], card: dict[str, Any], folder: Location, files: list[str], say: Callable[[str], None]
    ) -> bool:
        """Log what is missing, what the model scored (model.json) and files of the run folder, and end the run.

        Returns:
            False, and a line is said, if that fails.
        """
        self._thread.shutdown(cancel_futures=True)
        try:
            for entry in history:
                self._tell(entry)
            ended = int(1000 * time.time())
            if not self._client.get_metric_history(self.run_id, _LAST_METRIC):
                scored = [Metric(key, value, ended, history[-1]["epoch"]) for key, value in model_scalars(card).items()]
                self._client.log_batch(self.run_id, scored)
            for name in files:
                where, _, _ = name.rpartition("/")
                self._log_file(folder / name, where)
            self._client.set_terminated(self.run_id, end_time=ended)
        except Exception as error:
            say(f"--mlflow {self._uri}: {_line(error)}; the run is whole, and the same command with --resume tells it again")
            return False
        return True

    def _log_file(self, place: Location, where: str) -> None:
        with tempfile.TemporaryDirectory() as name:
            local = Path(name, place.path.rpartition("/")[2])
            local.write_bytes(place.read_bytes())
            self._client.log_artifact(self.run_id, str(local), where or None)

    def end(self, status: str) -> None:
        """End the run as `FAILED` or `KILLED`, if it can be reached."""
        self._thread.shutdown(cancel_futures=True)
        with contextlib.suppress(Exception):
            self._client.set_terminated(self.run_id, status=status)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()
