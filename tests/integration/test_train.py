"""Training as a person runs it: one command, what it prints, what it leaves."""

import html
import json
import re
import shutil
import signal
import threading
from _thread import interrupt_main
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from mnistsum_ray.api import fit
from mnistsum_ray.arguments import parse
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.data.images import pixels_view
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import RequestError, RunError, RunInterrupted, percent
from mnistsum_ray.model.folder import load_model
from mnistsum_ray.model.heads import HEADS
from mnistsum_ray.model.network import prepare_images
from mnistsum_ray.reporting.report import PICTURES, epoch_seconds
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.training.checkpoint import STATE_DIGEST
from tests.integration.conftest import (
    Done,
    history_of,
    joined,
    nodes,
    once,
    run_job,
    score_here,
    train_here,
)

EVERY = 5

# With all that a run draws: numbers, order, distortions, dropout.
LONG = ("--recipe", "long", "--epochs", 2, "--sum-head-steps", 100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(cluster: str, data: Path, runs: Path) -> Done:
    flags = ["--data", data, *LONG, "--precision", "fp32"]  # as plain PyTorch below
    return run_job("train", *flags, "--storage-path", runs, "--name", "one", address=cluster)


def test_the_last_line_is_the_contract(done: Done, runs: Path) -> None:
    assert len(done.out.splitlines()) == 1
    line = dict(done.line)
    assert line.pop("images_per_second") > 0
    assert line.pop("seconds") > 0
    test = line.pop("test")
    assert line == {
        "run": f"{runs}/one",
        "model": f"{runs}/one/model",
        "parameters": 220_125,
        "data": {"source": "parquet", "train_rows": 800, "validation_rows": 100, "test_rows": 100},
    }
    assert set(test) == {"rows", "pairs", "loss", "digit_accuracy", "sum_accuracy"}
    assert (test["rows"], test["pairs"]) == (100, 1000)


def test_a_person_sees_the_figures_and_not_rays_chatter(done: Done, runs: Path) -> None:
    lines = done.err.strip().splitlines()
    assert [line.partition(":")[0] for line in lines if ": loss " in line] == ["epoch 1", "epoch 2"]
    assert "rows/s" in done.err
    test = done.line["test"]
    words = [f"{100 * test[head.name + '_accuracy']:.2f} %" for head in HEADS]
    assert lines[-3:] == [
        f"test: digit {words[0]}, sum {words[1]} (100 rows, all 10 numbers)",
        f"report: {runs}/one/report.html",
        f"score with it: python jobs/score.py --model {runs}/one --input PAIRS --output SCORED",
    ]
    chatter = [
        line
        for line in lines
        if any(word in line for word in ("INFO", "WARNING", "(pid=", "raylet", "dataset_"))
    ]
    assert not chatter


def test_what_is_left(done: Done, runs: Path, data: Path) -> None:
    run = runs / "one"
    manifest = json.loads((run / "manifest.json").read_text())
    assert [(entry["epoch"], entry["workers"]) for entry in history_of(run)] == [(1, 1), (2, 1)]
    assert (manifest["status"], manifest["precision"], manifest["workers"]) == (
        "finished",
        "fp32",
        "1 CPU worker",
    )
    assert manifest["metrics"] == done.line
    assert {"ray", "torch", "pyarrow"} <= set(manifest["versions"])
    assert list((run / "tensorboard").glob("events.*"))
    digits = pq.read_table(data, columns=["digit"])["digit"].to_pylist()
    assert manifest["error_analysis"]["mistakes"]
    for mistake in manifest["error_analysis"]["mistakes"]:
        assert digits[mistake["row_id"]] == mistake["digit"], (
            "the row that a person looks up is that of the picture"
        )
    page = (run / "report.html").read_text()
    for name in PICTURES:
        assert (run / name).read_bytes().startswith(b"\x89PNG"), name
    assert page.count('src="data:image/') >= len(PICTURES)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page), "it can be mailed"
    for shown in (
        percent(done.line["test"]["sum_accuracy"]),
        "train_rows 800",
        str(run),
        *PICTURES.values(),
    ):
        assert shown in html.unescape(page)
    for path in run.rglob("*"):
        assert not path.is_file() or path.read_bytes()[:2] not in (
            b"\x80\x04",
            b"\x80\x05",
            b"PK",
        ), f"{path} is pickled"


def test_fine_tuning_the_sum_head_is_in_the_card_and_leaves_the_digits_alone(
    done: Done, runs: Path
) -> None:
    card, last = (
        json.loads((runs / "one" / "model" / "model.json").read_text()),
        history_of(runs / "one")[-1],
    )
    shares = [card["sum_head"][when]["validation"]["consistency"] for when in ("before", "after")]
    assert shares[0] < shares[1] <= 1
    for rows in ("validation", "test"):
        assert card[rows]["digit_accuracy"] == last[rows]["digit_accuracy"]
    said = "validation sums equal to digit + number: {} before, {} after\n".format(
        *map(percent, shares)
    )
    assert said in done.err


def test_the_model_scores_in_plain_pytorch_what_the_run_says(done: Done, data: Path) -> None:
    line = done.line
    model, card = load_model(locate(line["model"], "--model"))
    assert {name: card["test"][name] for name in line["test"]} == line["test"]
    source = open_source(str(data))
    table = pq.read_table(data).take(pa.array(source.test))
    images = torch.tensor(pixels_view(table["image"].combine_chunks()))
    digits = torch.tensor(table["digit"].to_pylist())
    right = 0
    with torch.no_grad():
        for number in range(10):
            digit, total, *_ = model(prepare_images(images), torch.full((len(images),), number))
            right += int((total.argmax(1) == digits + number).sum())
    assert line["test"]["digit_accuracy"] == pytest.approx(
        (digit.argmax(1) == digits).float().mean().item()
    )
    assert line["test"]["sum_accuracy"] == pytest.approx(right / 1000)
    assert 0 <= card["probabilities"]["digit"]["ece"] < 1
    assert card["temperatures_in_weights"].keys() == {"digit", "sum"}
    assert card["sha256"] != card["trained_sha256"], "the temperatures are in the weights"
    assert 0.5 < card["probabilities"]["consistent"] <= 1


@pytest.mark.slow
def test_a_finished_run_stays_finished_when_a_signal_comes_and_when_it_is_resumed(
    done: Done, data: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow gets the model after the manifest says that the run is finished, which takes seconds: then the signal comes."""
    with pytest.raises(RequestError, match="exists; go on with --resume"):
        train_here(data=data, storage_path=runs, name="one")
    run = Path(shutil.copytree(done.line["run"], tmp_path / "one"))
    card_file = run / "model" / "model.json"
    card = json.loads(card_file.read_text())
    for lost in ("model/model.json", "report.html"):  # killed before they were written
        (run / lost).unlink()
    store, settings = (
        f"sqlite:///{tmp_path}/store.db",
        {"storage_path": tmp_path, "name": "one", "resume": True},
    )
    MlflowClient(
        store
    ).search_experiments()  # makes the tables, which MLflow does not finish where it was interrupted

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with once((tmp_path / "mlartifacts").exists, interrupt), pytest.raises(RunInterrupted):
        train_here(mlflow=store, **settings)
    stored = json.loads((run / "manifest.json").read_text())
    assert stored["status"] == "finished"

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unlogged = train_here(mlflow="http://127.0.0.1:9", **settings)
    assert re.search(
        r"  --mlflow http://127.0.0.1:9: .*; the run is complete, and --resume logs it again$",
        unlogged.said,
        re.M,
    )
    resumed = train_here(mlflow=store, **settings)
    assert ": loss " not in resumed.said, "nothing is trained"
    assert (run / "report.html").exists()
    assert json.loads(card_file.read_text()) == card, "what was scored with it must go on as it was"
    assert resumed.line["test"] == {name: card["test"][name] for name in resumed.line["test"]}
    seconds = sum(map(epoch_seconds, history_of(run)))
    assert stored["training_seconds"] == round(seconds, 1), "of the command that has trained"
    client, (logged,) = (
        MlflowClient(store),
        re.findall(rf"  MLflow: run (\w+) at {store}$", resumed.said, re.M),
    )
    epochs = client.get_metric_history(logged, "epoch/test/loss")
    assert [metric.step for metric in epochs] == [1, 2], (
        "epochs that were trained without MLflow are logged too"
    )
    assert {*PICTURES, "report.html", "model"} <= {
        file.path for file in client.list_artifacts(logged)
    }
    assert logged in {
        version.run_id for version in client.search_model_versions("name = 'mnistsum'")
    }


@pytest.mark.slow
def test_another_run_begins_with_its_weights(done: Done, data: Path, tmp_path: Path) -> None:
    run = done.line["run"]
    settings = {"data": data, "storage_path": tmp_path, "epochs": 1, "sum_head_steps": 0}
    train_here(init_from=run, learning_rate=0.001, name="tuned", **settings)
    losses = [history_of(path)[0]["train_loss"] for path in (run, tmp_path / "tuned")]
    assert losses[1] < losses[0] / 2
    card = json.loads((Path(run) / "model" / "model.json").read_text())
    recorded = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["init_from"]
    assert recorded == {"model": run, "sha256": card["sha256"]}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_infinite_loss_stops_every_rank_at_once(
    data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"^epoch .* the loss is .* lower --learning-rate"):
        fit(
            TrainConfig(
                data=str(data),
                storage_path=str(runs),
                name="broken",
                learning_rate=1e30,
                num_workers=2,
            )
        )
    assert "Traceback" not in capsys.readouterr().err
    assert json.loads((runs / "broken" / "manifest.json").read_text())["status"] == "failed"


def test_its_config_trains_the_same_model_again_also_on_one_cpu_and_stopped_once(
    done: Done, data: Path, tmp_path: Path
) -> None:
    """One thread would compute other bits than the two that the run began with."""
    file, run = Path(done.line["run"], "config.yaml"), tmp_path / "again"
    flags = ["--config", str(file), "--storage-path", str(tmp_path), "--name", "again"]
    settings = parse(TrainConfig, flags, "").model_dump(exclude_unset=True)
    assert (
        settings["num_workers"],
        settings["use_gpu"],
        settings["threads"],
        settings["precision"],
    ) == (1, False, 2, "fp32")
    with nodes(1) as smaller, joined(smaller):
        with (
            once(lambda: [*run.glob(f"checkpoints/*/epoch_00001/{STATE_DIGEST}")], interrupt_main),
            pytest.raises(RunInterrupted),
        ):
            train_here(**settings)
        again = train_here(**settings | {"resume": True})
        scored = score_here(run, tmp_path / "out", data, number_column="digit")
    assert "going on after epoch 1, on 1 worker" in again.said
    assert again.line["test"] == done.line["test"]
    assert again.weights() == (Path(done.line["model"]) / "model.safetensors").read_bytes()
    written = [
        parse(TrainConfig, ["--config", str(path)], "") for path in (file, run / "config.yaml")
    ]
    assert written[0] == written[1]
    assert scored.line["scored_rows"] == 1000
