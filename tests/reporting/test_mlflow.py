"""MLflow, in a local store, gets every epoch once, also after it did not answer for a while."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from mnistsum_ray.errors import RequestError
from mnistsum_ray.reporting.mlflow import MLflowRun
from mnistsum_ray.reporting.report import epoch_scalars, model_scalars
from mnistsum_ray.storage.paths import locate
from tests.reporting.test_tensorboard import entry

CONFIG = {"seed": 3, "recipe": "short"}
MANIFEST: dict[str, Any] = {
    "config": CONFIG,
    "versions": {"ray": "2.60.0", "commit": "0123456789"},
    "data": {"source": "sample", "location": "/data/sample.parquet", "sha256": "ab" * 32}
    | {"train_rows": 4000, "validation_rows": 500, "test_rows": 500},
}
HISTORY = [entry(epoch) for epoch in (1, 2, 3)]
CARD = entry(4)  # as in model.json


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where a local store puts its files
    return tmp_path / "mlflow.db"


def uri(store: Path) -> str:
    return f"sqlite:///{store}"


def logged_epochs(store: Path, run_id: str) -> list[tuple[int, float]]:
    metrics: list[Metric] = MlflowClient(uri(store)).get_metric_history(run_id, "test/digit_accuracy")
    return [(metric.step, metric.value) for metric in metrics]


def wait_until_logged(store: Path, run_id: str, epochs: int) -> None:
    deadline = time.monotonic() + 30
    while len(logged_epochs(store, run_id)) < epochs:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expected(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["epoch"], line["test"]["digit_accuracy"]) for line in history]


def test_a_run_with_its_config_metrics_and_files(store: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    for name in ("report.html", "model/model.json"):
        (tmp_path / "run" / name).write_text(name)
    said: list[str] = []
    run = MLflowRun(uri(store), "mine", "a-name", None, MANIFEST)
    for line in HISTORY:
        run.log_epoch(line, said.append)
    assert run.finish(HISTORY, CARD, locate(str(tmp_path / "run"), "run"), ["report.html", "model/model.json"], said.append)
    assert not said
    client = MlflowClient(uri(store))
    found = client.get_run(run.run_id)
    assert (found.info.run_name, found.info.status) == ("a-name", "FINISHED")
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert found.data.params == {"seed": "3", "recipe": "short"}
    assert found.data.tags["mlflow.source.git.commit"] == "0123456789"
    assert found.data.tags["version.ray"] == "2.60.0"
    assert found.inputs
    (data,) = found.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("sample", "ab" * 18)
    assert "/data/sample.parquet" in data.dataset.source
    metrics = epoch_scalars(HISTORY[-1]) | model_scalars(CARD)
    assert found.data.metrics == {key: pytest.approx(value) for key, value in metrics.items()}
    assert logged_epochs(store, run.run_id) == expected(HISTORY)
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"report.html", "model"}
    assert [file.path for file in client.list_artifacts(run.run_id, "model")] == ["model/model.json"]


def test_a_resumed_run_logs_no_epoch_twice(store: Path, tmp_path: Path) -> None:
    first = MLflowRun(uri(store), "mine", "a-name", None, MANIFEST)
    for line in HISTORY[:2]:
        first.log_epoch(line, print)
    wait_until_logged(store, first.run_id, 2)
    first.end("FAILED")
    assert MlflowClient(uri(store)).get_run(first.run_id).info.status == "FAILED"
    again = MLflowRun(uri(store), "mine", "a-name", first.run_id, MANIFEST)
    again.log_epoch(HISTORY[1], print)
    assert again.finish(HISTORY, CARD, locate(str(tmp_path), "run"), [], print)
    assert logged_epochs(store, first.run_id) == expected(HISTORY)
    assert MlflowClient(uri(store)).get_run(first.run_id).info.status == "FINISHED"
    once_more = MLflowRun(uri(store), "mine", "a-name", first.run_id, MANIFEST)
    assert once_more.finish(HISTORY, CARD, locate(str(tmp_path), "run"), [], print)
    assert len(MlflowClient(uri(store)).get_metric_history(first.run_id, "model/test/loss")) == 1


def test_a_failure_is_reported_once_and_logged_later(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = MLflowRun(uri(store), "mine", "a-name", None, MANIFEST)
    run.log_epoch(HISTORY[0], said.append)
    wait_until_logged(store, run.run_id, 1)
    shutil.copy(store, tmp_path / "kept.db")
    store.write_bytes(b"not a database any more" * 1000)
    for line in HISTORY[1:]:
        run.log_epoch(line, said.append)
    deadline = time.monotonic() + 30
    while not said:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not run.finish(HISTORY, CARD, locate(str(tmp_path), "run"), [], said.append)
    assert len(said) == 2
    assert said[0].startswith(f"--mlflow {uri(store)}: ")
    assert said[0].endswith("training goes on, and the epoch is logged later")
    assert "--resume logs it again" in said[1]
    shutil.copy(tmp_path / "kept.db", store)
    again = MLflowRun(uri(store), "mine", "a-name", run.run_id, MANIFEST)
    assert again.finish(HISTORY, CARD, locate(str(tmp_path), "run"), [], said.append)
    assert logged_epochs(store, run.run_id) == expected(HISTORY)


@pytest.mark.parametrize("where", ["http://127.0.0.1:9", "sqlite:////dev/null/nowhere"])
def test_a_server_that_does_not_exist_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RequestError) as refused:
        MLflowRun(where, "mine", "a-name", None, MANIFEST)
    assert str(refused.value).startswith(f"--mlflow {where}: ")
    assert "\n" not in str(refused.value)


def test_the_process_is_left_as_it_was(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    names = ("mlflow", "alembic")
    before = dict(os.environ), [logging.getLogger(name).level for name in names]
    run = MLflowRun(uri(store), "mine", "a-name", None, MANIFEST)
    assert run.finish(HISTORY, CARD, locate(str(tmp_path), "run"), [], print)
    assert (dict(os.environ), [logging.getLogger(name).level for name in names]) == before
