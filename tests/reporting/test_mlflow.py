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

from mnistsum_ray import decode_images, load_model, predict
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.reporting.mlflow import log_run
from mnistsum_ray.reporting.report import epoch_scalars, model_scalars
from mnistsum_ray.storage.location import Location
from mnistsum_ray.storage.paths import locate
from tests.conftest import writable, write_model
from tests.reporting.test_tensorboard import entry

SETTINGS = {"seed": 3, "name": "a-name", "mlflow_experiment": "mine", "mlflow_model": "my.reader"}
MANIFEST: dict[str, Any] = {
    "versions": {"ray": "2.60.0", "commit": "0123456789"},
    "data": {"source": "sample", "location": "/data/sample.parquet", "sha256": "ab" * 32}
    | {"train_rows": 4000, "validation_rows": 500, "test_rows": 500},
}
HISTORY = [entry(epoch) for epoch in (1, 2, 3)]
CARD = entry(4) | {"sha256": "cd" * 32}  # as in model.json


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    """A run folder with a model that has not learnt anything."""
    write_model(tmp_path / "run" / "model", 0)
    return locate(str(tmp_path / "run"), "run")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return f"sqlite:///{tmp_path / 'store.db'}"  # not what MLflow takes where no store is named


def manifest_of(uri: str) -> dict[str, Any]:
    return MANIFEST | {"config": SETTINGS | {"mlflow": uri}}


def logged_epochs(store: str, run_id: str) -> list[tuple[int, float]]:
    metrics = MlflowClient(store).get_metric_history(run_id, "epoch/test/digit_accuracy")
    return [(metric.step, metric.value) for metric in metrics]


def expected(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["epoch"], line["test"]["digit_accuracy"]) for line in history]


def test_a_run_with_its_config_metrics_files_and_model(
    store: str, folder: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable(folder).write("report.html", b"<html>")
    said: list[str] = []
    manifest = manifest_of(store)
    run_id = log_run(manifest, HISTORY, CARD, folder, ["report.html", "model/model.json"], said.append)
    assert run_id
    assert manifest["mlflow"] == {"uri": store, "run_id": run_id}
    assert said == ["registering the model in MLflow as my.reader", f"MLflow: mlflow ui --backend-store-uri {store}"]
    client = MlflowClient(store)
    found = client.get_run(run_id)
    assert (found.info.run_name, found.info.status) == ("a-name", "FINISHED")
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.data.params == {key: str(value) for key, value in manifest["config"].items()}
    assert found.data.tags["mlflow.source.git.commit"] == "0123456789"
    assert found.data.tags["version.ray"] == "2.60.0"
    assert found.inputs
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("sample", "ab" * 18)
    assert "/data/sample.parquet" in data.dataset.source
    metrics = epoch_scalars(HISTORY[-1]) | model_scalars(CARD)
    assert found.data.metrics == {key: pytest.approx(value) for key, value in metrics.items()}
    assert logged_epochs(store, run_id) == expected(HISTORY)
    assert {file.path for file in client.list_artifacts(run_id)} == {"report.html", "model"}
    assert [file.path for file in client.list_artifacts(run_id, "model")] == ["model/model.json"]
    beside = tmp_path / "mlartifacts"
    assert found.info.artifact_uri == f"{beside.as_uri()}/{run_id}/artifacts"
    assert not list(Path.cwd().iterdir()), "the working folder has nothing to do with the store"

    (version,) = client.search_model_versions("name = 'my.reader'")
    assert (int(version.version), version.run_id) == (1, run_id)
    assert found.outputs
    (logged,) = (client.get_logged_model(output.model_id) for output in found.outputs.model_outputs)
    assert (logged.name, logged.status, logged.tags["sha256"]) == ("onnx", "READY", CARD["sha256"])
    assert logged.artifact_location.startswith(beside.as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # as a user of the registry does
    images, reasons = decode_images(pq.read_table(SAMPLE)["image"].slice(0, 300))
    numbers = np.arange(300) % 10
    assert not reasons
    predicted = mlflow.pyfunc.load_model("models:/my.reader/1").predict({"image": images, "number": numbers})
    ours = predict(load_model(folder.display), images, numbers)
    assert len(set(ours.digit)) > 1
    assert predicted["pred_digit"].tolist() == ours.digit.tolist()
    assert predicted["pred_sum"].tolist() == ours.sum.tolist()
    np.testing.assert_allclose(predicted["digit_prob"], ours.digit_prob, atol=1e-4)
    np.testing.assert_allclose(predicted["sum_prob"], ours.sum_prob, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_is_logged_again_has_no_epoch_and_no_model_twice(
    store: str, folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither after a server that stopped answering, nor after a registry that refused the model, nor after it was all there."""
    manifest, said, log_metrics = manifest_of(store), list[str](), mlflow.log_metrics

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("the registry is full\nas ever")

    def stop_answering(metrics: dict[str, float], step: int, timestamp: int) -> None:
        log_metrics(metrics, step, timestamp=timestamp) if step < 3 else refuse()

    for owner, name, stand_in in ((mlflow, "log_metrics", stop_answering), (MlflowClient, "_create_model_version", refuse)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stand_in)
            assert log_run(manifest, HISTORY, CARD, folder, [], said.append) is None
        end = "the registry is full; the run is complete, the same command with --resume logs it again"
        assert said.pop() == f"--mlflow {store}: {end}"
        logged = expected(HISTORY if owner is MlflowClient else HISTORY[:2])
        assert logged_epochs(store, manifest["mlflow"]["run_id"]) == logged
    client = MlflowClient(store)
    for _ in range(2):
        run_id = log_run(manifest, HISTORY, CARD, folder, [], print)
        assert run_id
        assert run_id == manifest["mlflow"]["run_id"]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert logged_epochs(store, run_id) == expected(HISTORY)
        assert len(client.get_metric_history(run_id, "final/test/loss")) == 1
        (version,) = client.search_model_versions("name = 'my.reader'")
        assert version.run_id == run_id
    assert len(client.search_runs([client.get_run(manifest["mlflow"]["run_id"]).info.experiment_id])) == 1


@pytest.mark.parametrize("where", ["http://127.0.0.1:9", "sqlite:////dev/null/nowhere"])
def test_a_server_that_does_not_answer_costs_a_line(where: str, folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    manifest, said = manifest_of(where), list[str]()
    assert log_run(manifest, HISTORY, CARD, folder, [], said.append) is None
    (line,) = said
    assert line.startswith(f"--mlflow {where}: ")
    assert line.endswith("; the run is complete, the same command with --resume logs it again")
    assert "\n" not in line
    assert "mlflow" not in manifest


@pytest.mark.slow
@pytest.mark.parametrize("theirs", [None, "sqlite:///theirs.db"])
def test_the_process_is_left_as_it_was(store: str, folder: Location, monkeypatch: pytest.MonkeyPatch, theirs: str | None) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    mlflow.set_tracking_uri(theirs)  # type: ignore[arg-type]
    active = mlflow.start_run() if theirs else None

    def state() -> list[Any]:
        levels = [logging.getLogger(name).level for name in ("mlflow", "alembic")]
        return [{key: value for key, value in os.environ.items() if key.startswith("MLFLOW")}, levels, mlflow.active_run()]

    before = state()
    assert log_run(manifest_of(store), HISTORY, CARD, folder, [], print)
    assert state() == before
    if active:
        assert mlflow.get_tracking_uri() == theirs
        assert mlflow.get_run(active.info.run_id).data.metrics == {}
        mlflow.end_run()
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
