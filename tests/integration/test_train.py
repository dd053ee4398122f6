"""Training as a person runs it: what it prints, what it leaves, and how it begins from another."""

import html
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from ray.train import UserCallback

from mnistsum_ray import RequestError, RunError, TrainConfig, fit, load_model, predict
from mnistsum_ray.arguments import parse
from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.sources import SAMPLE, open_source
from mnistsum_ray.errors import TryAgainError, percent
from mnistsum_ray.model.network import prepare_images
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import (
    Done,
    Job,
    history_of,
    joined,
    nodes,
    run_job,
    score_here,
    train_here,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(cluster: str, data: Path, runs: Path) -> Done:
    """A run with all that a run draws: numbers, order, distortions, dropout."""
    flags = ["--data", data, "--recipe", "long", "--epochs", 2, "--sum-head-steps", 100]
    flags += ["--precision", "fp32"]  # as plain PyTorch below
    return run_job("train", *flags, "--storage-path", runs, "--name", "one", address=cluster)


@pytest.fixture(scope="module")
def card(done: Done, runs: Path) -> dict[str, Any]:
    """What model.json says."""
    found: dict[str, Any] = json.loads((runs / "one" / "model" / "model.json").read_text())
    return found


def test_standard_output_has_the_result_and_standard_error_the_figures(
    done: Done, runs: Path
) -> None:
    assert len(done.out.splitlines()) == 1
    line = dict(done.line)
    test = line.pop("test")
    assert line.keys() == {"run", "model", "parameters", "data", "images_per_second", "seconds"}
    assert (line["run"], line["model"]) == (f"{runs}/one", f"{runs}/one/model")
    assert line["parameters"] == 220_125
    rows = {"train_rows": 800, "validation_rows": 100, "test_rows": 100}
    assert line["data"] == {"source": "parquet", **rows}
    assert test.keys() == {"rows", "pairs", "loss", "digit_accuracy", "sum_accuracy"}
    assert (test["rows"], test["pairs"]) == (100, 1000)

    lines = done.err.strip().splitlines()
    assert re.findall(r"epoch (\d): loss ", done.err) == ["1", "2"]
    digit, total = (f"{100 * test[f'{head}_accuracy']:.2f} %" for head in ("digit", "sum"))
    score = f"python jobs/score.py --model {runs}/one --input PAIRS --output SCORED"
    last = (
        f"test: digit {digit}, sum {total} (100 rows, all 10 numbers)",
        f"report: {runs}/one/report.html",
        f"score with it: {score}",
    )
    assert all(line.endswith(text) for line, text in zip(lines[-3:], last, strict=True))
    chatter = ("INFO", "WARNING", "(pid=", "raylet", "dataset_")
    assert not [line for line in lines if any(word in line for word in chatter)]


def test_the_run_folder_holds_history_report_pictures_and_no_pickle(
    done: Done, runs: Path, data: Path
) -> None:
    run = runs / "one"
    manifest = json.loads((run / "manifest.json").read_text())
    assert [(line["epoch"], line["workers"]) for line in history_of(run)] == [(1, 1), (2, 1)]
    found = (manifest["status"], manifest["precision"], manifest["workers"])
    assert found == ("finished", "fp32", "1 CPU worker")
    assert manifest["metrics"] == done.line
    assert {"ray", "torch", "pyarrow"} <= set(manifest["versions"])
    digits = pq.read_table(data, columns=["digit"])["digit"].to_pylist()
    assert manifest["error_analysis"]["mistakes"]
    for mistake in manifest["error_analysis"]["mistakes"]:
        assert digits[mistake["row_id"]] == mistake["digit"], "the row that a person looks up"
    page = html.unescape((run / "report.html").read_text())
    pictures = sorted(run.glob("*.png"))
    assert len(pictures) == page.count('src="data:image/') == 4
    for shown in (percent(done.line["test"]["sum_accuracy"]), "train_rows 800", str(run)):
        assert shown in page
    for path in run.rglob("*"):
        start = path.read_bytes()[:2] if path.is_file() else b""
        assert start not in (b"\x80\x04", b"\x80\x05", b"PK"), f"{path} is pickled"


def test_the_model_scores_in_plain_pytorch_what_the_run_says(
    done: Done, card: dict[str, Any], data: Path
) -> None:
    line = done.line
    assert {name: card["test"][name] for name in line["test"]} == line["test"]
    table = pq.read_table(data).take(pa.array(open_source(str(data)).test))
    images = prepare_images(torch.tensor(pixels_view(table["image"].combine_chunks())))
    digits = torch.tensor(table["digit"].to_pylist())
    model = load_model(line["model"])
    right = 0
    with torch.no_grad():
        for number in range(10):
            digit, total, *_ = model(images, torch.full((len(images),), number))
            right += int((total.argmax(1) == digits + number).sum())
    accuracy = (digit.argmax(1) == digits).float().mean().item()
    assert line["test"]["digit_accuracy"] == pytest.approx(accuracy)
    assert line["test"]["sum_accuracy"] == pytest.approx(right / 1000)


def test_the_sum_head_was_fine_tuned_and_the_probabilities_calibrated(
    done: Done, card: dict[str, Any], runs: Path
) -> None:
    shares = [card["sum_head"][when]["validation"]["consistency"] for when in ("before", "after")]
    assert shares[0] < shares[1] <= 1
    said = "validation sums equal to digit + number: {} before, {} after\n"
    assert said.format(*map(percent, shares)) in done.err
    last = history_of(runs / "one")[-1]
    assert card["test"]["digit_accuracy"] == last["test"]["digit_accuracy"]
    assert 0 <= card["probabilities"]["digit"]["ece"] < 1
    assert card["temperatures_in_weights"].keys() == {"digit", "sum"}


def check_mlflow(store: str, run: Path, said: str) -> None:
    """Each epoch, the files and a registered model that predicts as the run's does."""
    (logged,) = re.findall(rf"MLflow: run (\w+) at {store}$", said, re.MULTILINE)
    client = MlflowClient(store)
    found = client.get_run(logged)
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert (found.data.params["recipe"], found.data.params["epochs"]) == ("long", "2")
    epochs = client.get_metric_history(logged, "epoch/test/digit_accuracy")
    values = [(line["epoch"], line["test"]["digit_accuracy"]) for line in history_of(run)]
    assert [(metric.step, metric.value) for metric in epochs] == values
    files = {file.path for file in client.list_artifacts(logged)}
    assert files >= {"report.html", "model", "onnx", "history.png"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)  # as a user of the registry does
        model = mlflow.pyfunc.load_model("models:/mnistsum/1")
    images = pixels_view(pq.read_table(SAMPLE)["image"].combine_chunks())[::20]
    numbers = np.arange(len(images)) % 10
    answers = model.predict({"image": images, "number": numbers})
    expected = predict(load_model(run), images, numbers)
    assert answers["pred_digit"].tolist() == expected.digit.tolist()
    assert answers["pred_sum"].tolist() == expected.sum.tolist()


@pytest.mark.slow
def test_a_finished_run_is_resumed_without_training_and_logged_to_mlflow(
    done: Done, card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before model.json and the report were written."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run = Path(shutil.copytree(done.line["run"], tmp_path / "one"))
    for lost in ("model/model.json", "report.html"):
        (run / lost).unlink()
    settings = {"storage_path": tmp_path, "name": "one", "resume": True}
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unlogged = train_here(mlflow="http://127.0.0.1:9", **settings)
    said = r"--mlflow http://127.0.0.1:9: .*; the run is complete, and --resume logs it again$"
    assert re.search(said, unlogged.said, re.MULTILINE)
    store = f"sqlite:///{tmp_path}/store.db"
    resumed = train_here(mlflow=store, **settings)
    assert ": loss " not in unlogged.said + resumed.said
    assert (run / "report.html").exists()
    written = json.loads((run / "model" / "model.json").read_text())
    assert written == card, "what was scored with it must go on as it was"
    assert not list(Path.cwd().iterdir()), "Ray deletes the working folder of a submitted job"
    check_mlflow(store, run, resumed.said)


@pytest.mark.slow
def test_another_run_begins_with_its_weights(
    done: Done, card: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """A callback of Ray Train gets each report."""
    run, reports = done.line["run"], tmp_path / "reports.jsonl"

    class Keep(UserCallback):
        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
            with reports.open("a") as file:
                file.write(json.dumps(metrics[0]) + "\n")

    place: dict[str, Any] = {"data": str(data), "storage_path": str(tmp_path), "name": "tuned"}
    settings = {"init_from": run, "learning_rate": 0.001, "epochs": 2, "sum_head_steps": 0}
    fit(TrainConfig(**place, **settings), callbacks=[Keep()])
    first, tuned = history_of(run), history_of(tmp_path / "tuned")
    assert tuned[0]["train_loss"] < first[0]["train_loss"] / 2
    recorded = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["init_from"]
    assert recorded == {"model": run, "sha256": card["sha256"]}
    names = ("epoch", "train_loss", "validation", "test")
    kept = [json.loads(line) for line in reports.read_text().splitlines()]
    assert kept == [{name: line[name] for name in names} for line in tuned]


@pytest.mark.slow
def test_an_infinite_loss_stops_every_rank_at_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cluster: str
) -> None:
    settings: dict[str, Any] = {"learning_rate": 9e5, "num_workers": 2, "name": "broken"}
    with pytest.raises(RunError, match=r"^epoch .* the loss is .* lower --learning-rate"):
        fit(TrainConfig(data=str(data), storage_path=str(tmp_path), **settings))
    assert "Traceback" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "broken" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    with pytest.raises(RequestError, match="exists; go on with --resume"):
        train_here(data=data, storage_path=tmp_path, name="broken")


def test_a_folder_that_another_run_holds_is_refused(tmp_path: Path, cluster: str) -> None:
    run = tmp_path / "mine"
    said = rf"^--name {run}: another run \(.*\) is writing there; wait for it"
    with (
        folder_lock(locate(str(run), "--name"), "--name", print),
        pytest.raises(TryAgainError, match=said),
    ):
        train_here(data="sample", storage_path=tmp_path, name="mine")


def test_a_wrong_request_is_one_line_and_begins_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    done = run_job("train", "--data", tmp_path, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    (error,) = done.err.splitlines()
    assert error.startswith(f"error: {tmp_path}/a.parquet: is not Parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.slow
def test_its_config_trains_the_same_model_again_also_on_one_cpu_and_stopped_once(
    done: Done, data: Path, tmp_path: Path
) -> None:
    """One thread would compute other bits than the two that the run began with."""
    file, run = Path(done.line["run"], "config.yaml"), tmp_path / "again"
    flags = ["--config", str(file), "--storage-path", str(tmp_path), "--name", "again"]
    with nodes(1) as smaller, joined(smaller):
        job = Job("train", *flags, address=smaller.address)
        job.wait_until(lambda: [*run.glob("checkpoints/*/epoch_00001/*.sha256")])
        job.process.send_signal(signal.SIGTERM)
        stopped = job.wait()
        again = train_here(storage_path=tmp_path, name="again", resume=True)
        scored = score_here(run, tmp_path / "out", data, number_column="digit")
    assert stopped.code == 128 + signal.SIGTERM
    assert f"--storage-path {tmp_path} --name again --resume\n" in stopped.err
    assert "going on after epoch 1, on 1 worker" in again.said
    assert again.line["test"] == done.line["test"]
    assert again.weights() == (Path(done.line["model"]) / "model.safetensors").read_bytes()
    written = [parse(TrainConfig, ["--config", str(path)], "") for path in (file, run / file.name)]
    assert written[0] == written[1]
    assert scored.line["scored_rows"] == 1000
