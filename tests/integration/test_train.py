"""Training as a person runs it: what it prints, what it leaves, and how it begins from another."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mnistsum_ray import RequestError, RunError, TrainConfig, load_model
from mnistsum_ray.arguments import parse
from mnistsum_ray.data.images import Pixels
from mnistsum_ray.data.sources import open_source
from mnistsum_ray.errors import TryAgainError, percent
from mnistsum_ray.model.network import prepare_images
from mnistsum_ray.storage.lock import folder_lock
from mnistsum_ray.storage.uri import locate
from tests.integration.conftest import joined, metrics_of, nodes, train_here
from tests.jobs import Done, Job, history_of, run_job, training, wait_until


@pytest.fixture(scope="module")
def done(cluster: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run with all that a run draws: numbers, order, distortions, dropout."""
    flags: list[Any] = ["--recipe", "long", "--epochs", 3, "--sum-head-steps", 100]
    flags += ["--precision", "fp32"]  # as plain PyTorch below
    return run_job(*training(data, tmp_path_factory.mktemp("läufe"), *flags), address=cluster)


@pytest.fixture(scope="module")
def run(done: Done) -> Path:
    return Path(done.line["run"])


@pytest.fixture(scope="module")
def card(run: Path) -> dict[str, Any]:
    """What model.json says."""
    found: dict[str, Any] = json.loads((run / "model" / "model.json").read_text())
    return found


def test_standard_output_has_the_result_and_standard_error_the_figures(done: Done) -> None:
    (out,) = done.out.splitlines()
    line = json.loads(out)
    test = line.pop("test")
    assert line.keys() == {"run", "model", "parameters", "data", "images_per_second", "seconds"}
    assert (line["model"], line["parameters"]) == (f"{line['run']}/model", 220_125)
    rows = {"train_rows": 800, "validation_rows": 100, "test_rows": 100}
    assert line["data"] == {"source": "parquet", **rows}
    assert test.keys() == {"rows", "pairs", "loss", "digit_accuracy", "sum_accuracy"}
    assert (test["rows"], test["pairs"]) == (100, 1000)
    digit, total = (f"{100 * test[f'{head}_accuracy']:.2f} %" for head in ("digit", "sum"))
    assert f"test: digit {digit}, sum {total} (100 rows, all 10 numbers)\n" in done.err
    assert re.findall(r"epoch (\d): loss ", done.err) == ["1", "2", "3"]
    # Lines of a raylet tell of the machine: how many processes it started while all tests ran.
    lines = [line for line in done.err.splitlines() if "(raylet)" not in line]
    assert not [line for line in lines if re.search(r"INFO|WARNING|\(pid=|dataset_", line)]


def test_the_run_folder_holds_history_report_pictures_and_no_pickle(
    done: Done, run: Path, card: dict[str, Any], data: Path
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    history = history_of(run)
    assert [(line["epoch"], line["workers"]) for line in history] == [(1, 1), (2, 1), (3, 1)]
    assert (manifest["status"], manifest["metrics"]) == ("finished", done.line)
    assert {"ray", "torch", "pyarrow"} <= set(manifest["versions"])
    digits = pq.read_table(data, columns=["digit"])["digit"].to_pylist()
    assert manifest["error_analysis"]["mistakes"]
    for mistake in manifest["error_analysis"]["mistakes"]:
        assert digits[mistake["row_id"]] == mistake["digit"], "the row that a person looks up"
    page = (run / "report.html").read_text()
    assert len([*run.glob("*.png")]) == page.count('src="data:image/') > 0
    assert percent(done.line["test"]["sum_accuracy"]) in page
    for path in run.rglob("*"):
        start = path.read_bytes()[:2] if path.is_file() else b""
        assert start not in (b"\x80\x04", b"\x80\x05", b"PK"), f"{path} is pickled"
    # The sum head was fine-tuned, and the probabilities calibrated.
    shares = [card["sum_head"][when]["validation"]["consistency"] for when in ("before", "after")]
    assert shares[0] < shares[1] <= 1
    assert card["test"]["digit_accuracy"] == history[-1]["test"]["digit_accuracy"]
    assert card["temperatures_in_weights"].keys() == {"digit", "sum"}


def test_prometheus_sees_the_rows_of_a_job_that_has_ended(done: Done) -> None:
    rows, run = 3 * done.line["data"]["train_rows"], done.line["run"]
    wait_until(lambda: metrics_of(run).get("ray_mnistsum_rows_total") == rows, 30)


def test_the_model_scores_in_plain_pytorch_what_the_run_says(
    done: Done, data: Path, sample: pa.Table, pixels: Pixels
) -> None:
    rows = open_source(str(data)).test * 5  # every fifth of the sample is in the data
    images = prepare_images(torch.tensor(pixels[rows]))
    digits = torch.tensor(sample["digit"].to_numpy()[rows])
    network = load_model(done.line["model"])
    right = 0
    with torch.no_grad():
        for number in range(10):
            digit, total, *_ = network(images, torch.full((len(images),), number))
            right += int((total.argmax(1) == digits + number).sum())
    accuracy = (digit.argmax(1) == digits).float().mean().item()
    assert done.line["test"]["digit_accuracy"] == pytest.approx(accuracy)
    assert done.line["test"]["sum_accuracy"] == pytest.approx(right / 1000)


@pytest.mark.slow
def test_a_finished_run_is_resumed_without_training(
    run: Path, card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before model.json and the report were written. At first another holds it."""
    copy = Path(shutil.copytree(run, tmp_path / "mine"))
    for lost in ("model/model.json", "report.html"):
        (copy / lost).unlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    settings = {"storage_path": tmp_path, "name": "mine", "resume": True}
    said = r"another run \(.*\) is writing there; wait for it"
    held = folder_lock(locate(str(copy), "--name"), "--name")
    with held, pytest.raises(TryAgainError, match=said):
        train_here(**settings)
    assert ": loss " not in train_here(**settings).said
    assert (copy / "report.html").exists()
    written = json.loads((copy / "model" / "model.json").read_text())
    assert written == card, "what was scored with it must go on as it was"
    assert not list(Path.cwd().iterdir()), "Ray deletes the working folder of a submitted job"


@pytest.mark.slow
def test_another_run_begins_with_its_weights(
    run: Path, card: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """With `--resume auto`, though there is nothing to resume."""
    settings: dict[str, Any] = {"data": data, "storage_path": tmp_path, "name": "tuned"}
    settings |= {"init_from": run, "learning_rate": 0.001, "epochs": 1, "sum_head_steps": 0}
    train_here(**settings, resume="auto")
    (tuned,) = history_of(tmp_path / "tuned")
    assert tuned["train_loss"] < history_of(run)[0]["train_loss"] / 2
    recorded = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["init_from"]
    assert recorded == {"model": str(run), "sha256": card["sha256"]}


@pytest.mark.slow
def test_an_infinite_loss_stops_every_rank_at_once(
    cluster: str, data: Path, tmp_path: Path
) -> None:
    """The data are at a URI."""
    place = locate("s3://bucket/training/rows.parquet", "--data")
    place.write(data.read_bytes())
    settings = {"data": place.display, "storage_path": tmp_path, "name": "broken"}
    with pytest.raises(RunError, match=r"^epoch .* the loss is .* lower --learning-rate"):
        train_here(**settings, num_workers=2, learning_rate=9e5)
    assert json.loads((tmp_path / "broken" / "manifest.json").read_text())["status"] == "failed"
    with pytest.raises(RequestError, match="exists; go on with --resume"):
        train_here(**settings)


@pytest.mark.slow
def test_the_config_of_a_run_trains_the_same_model_on_one_cpu_also_after_ctrl_c(
    done: Done, run: Path, tmp_path: Path
) -> None:
    """One thread would compute other bits than the two that the run began with."""
    file, again = run / "config.yaml", tmp_path / "again"
    flags = ["--config", str(file), "--storage-path", str(tmp_path), "--name", "again"]
    with nodes(1) as smaller, joined(smaller):
        job = Job("train", *flags, address=smaller.address)
        job.wait_until(lambda: [*again.glob("checkpoints/*/epoch_00001/*.sha256")])
        job.process.send_signal(signal.SIGINT)
        stopped = job.wait()
        resumed = train_here(storage_path=tmp_path, name="again", resume=True)
    assert stopped.code == 128 + signal.SIGINT
    assert f"--storage-path {tmp_path} --name again --resume\n" in stopped.err
    assert re.search("going on after epoch [12], on 1 worker", resumed.said)
    assert resumed.line["test"] == done.line["test"]
    assert resumed.weights() == (run / "model" / "model.safetensors").read_bytes()
    first, second = (
        parse(TrainConfig, ["--config", str(folder / file.name)], "") for folder in (run, again)
    )
    assert first == second
