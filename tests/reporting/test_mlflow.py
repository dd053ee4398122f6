"""MLflow, in a local store, gets every epoch once, also after it did not answer, and the model."""

import logging
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mnistsum_ray import load_model, predict
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.reporting.mlflow import log_run
from mnistsum_ray.reporting.report import epoch_scalars, model_scalars
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from tests.conftest import write_model
from tests.reporting.test_tensorboard import entry

SETTINGS = {"seed": 3, "name": "a-name", "mlflow_experiment": "mine", "mlflow_model": "my.reader"}
MANIFEST: dict[str, Any] = {
    "versions": {"ray": "2.60.0", "commit": "0123456789"},
    "data": {"source": "sample", "location": "/data/sample.parquet", "sha256": "ab" * 32},
}
HISTORY = [entry(epoch) for epoch in (1, 2, 3)]
CARD = entry(4) | {"sha256": "cd" * 32}  # as in model.json
AGAIN = "; the run is complete, the same command with --resume logs it again"


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """A run folder with a model that has not learnt anything."""
    write_model(tmp_path / "run" / "model", 0)
    (tmp_path / "run" / "report.html").write_text("<html>")
    return locate(str(tmp_path / "run"), "run")


def manifest_of(uri: str) -> dict[str, Any]:
    return MANIFEST | {"config": SETTINGS | {"mlflow": uri}}


def state() -> list[Any]:
    """What another user of MLflow in this process sees."""
    levels = [logging.getLogger(name).level for name in ("mlflow", "alembic")]
    return [{key: value for key, value in os.environ.items() if key.startswith("MLFLOW")}, levels, mlflow.active_run()]


@pytest.mark.slow
def test_a_run_is_logged_once_with_config_metrics_files_and_model(
    folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a server that stopped answering, and after it was all there. A run of the caller's own stays active."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # The same database, since a new one takes seconds.
    theirs, store = f"sqlite:///{tmp_path}/elsewhere/../store.db", f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    mlflow.set_tracking_uri(theirs)
    active = mlflow.start_run(experiment_id=mlflow.create_experiment("theirs", (tmp_path / "theirs").as_uri()))
    before, client = state(), MlflowClient(store)
    manifest, said, log_metrics = manifest_of(store), list[str](), mlflow.log_metrics

    def logged_epochs() -> list[tuple[int, float]]:
        metrics = client.get_metric_history(manifest["mlflow"]["run_id"], "epoch/test/digit_accuracy")
        return [(metric.step, metric.value) for metric in metrics]

    def stop_answering(metrics: dict[str, float], step: int, timestamp: int) -> None:
        if step == 3:
            raise MlflowException("the server is gone\nas ever")
        log_metrics(metrics, step, timestamp=timestamp)

    expected = [(line["epoch"], line["test"]["digit_accuracy"]) for line in HISTORY]
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_metrics", stop_answering)
        assert log_run(manifest, HISTORY, CARD, folder, [], said.append) is None
    assert said.pop() == f"--mlflow {store}: the server is gone{AGAIN}"
    assert logged_epochs() == expected[:2]
    for _ in range(2):
        run_id = log_run(manifest, HISTORY, CARD, folder, ["report.html", "model/model.json"], said.append)
        assert run_id
        assert manifest["mlflow"] == {"uri": store, "run_id": run_id}
        assert logged_epochs() == expected
        assert len(client.get_metric_history(run_id, "final/test/loss")) == 1
        (version,) = client.search_model_versions("name = 'my.reader'")
        assert version.run_id == run_id
    run_id = manifest["mlflow"]["run_id"]
    shown = f"MLflow: mlflow ui --backend-store-uri {store}"
    assert said == ["registering the model in MLflow as my.reader", shown, shown]

    assert state() == before
    assert mlflow.get_tracking_uri() == theirs
    assert mlflow.get_run(active.info.run_id).data.metrics == {}
    mlflow.end_run()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]

    found = client.get_run(run_id)
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert (found.info.run_name, found.info.status) == ("a-name", "FINISHED")
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.data.params == {key: str(value) for key, value in manifest["config"].items()}
    assert (found.data.tags["mlflow.source.git.commit"], found.data.tags["version.ray"]) == ("0123456789", "2.60.0")
    assert (found.data.tags["data.source"], found.data.tags["data.sha256"]) == ("sample", "ab" * 32)
    metrics = epoch_scalars(HISTORY[-1]) | model_scalars(CARD)
    assert found.data.metrics == {key: pytest.approx(value) for key, value in metrics.items()}
    assert {file.path for file in client.list_artifacts(run_id)} == {"report.html", "model"}
    beside = tmp_path / "mlartifacts"
    assert found.info.artifact_uri == f"{beside.as_uri()}/{run_id}/artifacts"
    assert not list(Path.cwd().iterdir()), "the working folder has nothing to do with the store"
    check_registered_model(store, folder, monkeypatch)


def check_registered_model(store: str, folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers like the model of the run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # as a user of the registry does
    images = pixels_view(one_chunk(pq.read_table(SAMPLE)["image"]))[:300]
    numbers = np.arange(300) % 10
    predicted = mlflow.pyfunc.load_model("models:/my.reader/1").predict({"image": images, "number": numbers})
    ours = predict(load_model(folder.display), images, numbers)
    assert len(set(ours.digit)) > 1
    for head in ("digit", "sum"):
        assert predicted[f"pred_{head}"].tolist() == getattr(ours, head).tolist()
        np.testing.assert_allclose(predicted[f"{head}_prob"], getattr(ours, f"{head}_prob"), atol=1e-4)


def test_a_server_that_does_not_answer_costs_a_line(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before, manifest, said = state(), manifest_of(where), list[str]()
    assert log_run(manifest, HISTORY, CARD, folder, [], said.append) is None
    (line,) = said
    assert line.startswith(f"--mlflow {where}: ")
    assert line.endswith(AGAIN)
    assert "\n" not in line
    assert "mlflow" not in manifest
    assert state() == before
