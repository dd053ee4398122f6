"""MLflow, in a local store, gets every epoch and a model that can be loaded back."""

import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from mnistsum_ray import load_model, predict
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.reporting.mlflow import log_run
from mnistsum_ray.reporting.report import epoch_scalars, scores
from mnistsum_ray.storage.store import Location
from mnistsum_ray.storage.uri import locate
from tests.conftest import write_model
from tests.reporting.test_tensorboard import entry

SETTINGS = {"seed": 3, "name": "a-name", "mlflow_experiment": "mine", "mlflow_model": "my.reader"}
HISTORY = [entry(epoch) for epoch in (1, 2, 3)]
CARD = entry(3) | {"input": {"image": "28 x 28", "number": "0-9"}}  # as in model.json


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """A run folder with a model that has not learnt anything."""
    write_model(tmp_path / "run" / "model", 0)
    (tmp_path / "run" / "report.html").write_text("<html>")
    return locate(str(tmp_path / "run"), "run")


def manifest_of(uri: str) -> dict[str, Any]:
    data = {"source": "sample", "location": "/data/sample.parquet", "sha256": "ab" * 32}
    return {"versions": {"ray": "2.60.0"}, "data": data, "config": SETTINGS | {"mlflow": uri}}


def state() -> list[Any]:
    """What another user of MLflow in this process sees."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW")}
    return [environment, mlflow.get_tracking_uri(), mlflow.active_run()]


@pytest.mark.slow
def test_a_run_is_logged_with_config_metrics_files_and_model(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store, before = f"sqlite:///{tmp_path}/store.db", state()
    files = ["report.html", "model/model.json"]
    run_ids = [
        log_run(manifest_of(store), HISTORY, CARD, folder, files) for _ in range(2)
    ]  # of the same names
    assert state() == before
    client = MlflowClient(store)
    assert {version.run_id for version in client.search_model_versions("name = 'my.reader'")} == {
        *run_ids
    }
    for run_id in run_ids:
        found = client.get_run(run_id)
        assert (found.info.run_name, found.info.status) == ("a-name", "FINISHED")
        assert client.get_experiment(found.info.experiment_id).name == "mine"
        assert found.data.params == {
            key: str(value) for key, value in manifest_of(store)["config"].items()
        }
        assert found.data.tags.items() >= {"ray": "2.60.0", "data.source": "sample"}.items()
        metrics = epoch_scalars(HISTORY[-1]) | scores(CARD, "final")
        assert found.data.metrics == {key: pytest.approx(value) for key, value in metrics.items()}
        epochs = client.get_metric_history(run_id, "epoch/test/digit_accuracy")
        assert [(one.step, one.value) for one in epochs] == [
            (one["epoch"], one["test"]["digit_accuracy"]) for one in HISTORY
        ]
        assert {file.path for file in client.list_artifacts(run_id)} == {
            "report.html",
            "model",
            "onnx",
        }
    assert not list(Path.cwd().iterdir()), "Ray deletes the working folder of a submitted job"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # as a user of the registry does
    images = pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:300]
    numbers = np.arange(300) % 10
    predicted = mlflow.pyfunc.load_model("models:/my.reader/2").predict(
        {"image": images, "number": numbers}
    )
    ours = predict(load_model(folder.display), images, numbers)
    for head in ("digit", "sum"):
        assert predicted[f"pred_{head}"].tolist() == getattr(ours, head).tolist()
