"""Each file of jobs/examples, and jobs/benchmark.py, runs as it is; so does .readme/recipes.md."""

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray import load_model
from mnistsum_ray.data.columns import Array
from tests.conftest import check_predictions, plain_predictions, write_sample
from tests.jobs import ROOT, Job, free_port, history_of, run_job

# Libraries of one example are imported by its test: together they take seconds, in each process of
# the tests. What takes long runs at night; mypy knows the names that an example uses.
pytestmark = pytest.mark.slow

ANSWERS = ("pred_digit", "digit_prob", "pred_sum", "sum_prob")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """The working folder, with the run runs/mine, the rows of a training, and a picture."""
    shutil.copytree(model, tmp_path / "runs" / "mine")
    write_sample(tmp_path / "rows.parquet", 500)
    shutil.copy(ROOT / ".readme" / "seven.png", tmp_path)
    return tmp_path


def run_example(folder: Path, name: str, *args: object, **options: Any) -> str:
    """Run an example to its end; return its standard output."""
    done = run_job(f"examples/{name}", *args, cwd=folder, **options)
    assert done.code == 0, done.err
    return done.out


def train_flags(folder: Path, name: str) -> list[Any]:
    """Two epochs of few rows."""
    return ["--data", folder / "rows.parquet", "--name", name, "--epochs", 2, "--threads", 1]


@pytest.mark.nightly
def test_an_onnx_file_answers_as_pytorch_and_not_for_other_numbers(
    folder: Path, pixels: Array
) -> None:
    import onnxruntime

    run_example(folder, "onnx_export", "--model", "runs/mine", "--output", "mine.onnx")
    session = onnxruntime.InferenceSession(folder / "mine.onnx")
    images, numbers = pixels[::100], np.arange(50) % 10
    found = session.run(ANSWERS, {"image": images, "number": numbers})
    expected = plain_predictions(folder / "runs" / "mine", images, numbers)
    for name, values in zip(ANSWERS, found, strict=True):
        assert np.allclose(values, expected[name], atol=1e-3), name
    others = session.run(ANSWERS, {"image": images[:3], "number": np.array([-1, 10, 9])})
    assert others[2].tolist()[:2] == [-1, -1]
    assert np.isnan(others[3]).tolist() == [True, True, False]


def test_plain_pytorch_as_in_the_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / ".readme" / "recipes.md").read_text()
    code = document.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["sum_logits"].shape == (3, 19)


def test_a_task_of_ones_own_counts_each_row(tmp_path: Path) -> None:
    assert "with all 1001 rows in each epoch" in run_example(tmp_path, "own_task")


@pytest.mark.nightly
def test_a_task_of_ones_own_learns_the_same_when_it_is_killed(tmp_path: Path) -> None:
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    killed = Job("examples/own_task", cwd=tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "runs" / "own_task"
    killed.wait_until(lambda: len([*checkpoints.glob("checkpoint_*/state.pt")]) > 2)
    killed.kill()
    results = [
        run_example(tmp_path / name, "own_task").splitlines()[-1] for name in ("calm", "killed")
    ]
    assert results[0] == results[1]
    assert results[0].startswith("2 and 1 are learnt as ")


@pytest.mark.nightly
def test_mlflow_has_each_epoch_at_once_and_the_end_of_a_run_that_is_stopped(
    cluster: str, folder: Path
) -> None:
    from mlflow import MlflowClient

    place: dict[str, Any] = {"address": cluster, "cwd": folder}
    job = Job("examples/mlflow_callback", *train_flags(folder, "short"), **place)
    job.wait_for_line("on the Ray cluster")  # the example has made MLflow's tables
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")

    def runs_named(name: str) -> list[Any]:
        return list(client.search_runs(["0"], f"attributes.run_name = '{name}'"))

    job.wait_until(lambda: any("test/loss" in run.data.metrics for run in runs_named("short")))
    assert job.process.poll() is None, "the training goes on"
    assert job.wait().code == 0
    (run,) = runs_named("short")
    assert (run.info.status, run.data.params["epochs"]) == ("FINISHED", "2")
    logged = client.get_metric_history(run.info.run_id, "test/sum_accuracy")
    history = history_of(folder / "runs" / "short")
    assert [entry.value for entry in logged] == [line["test"]["sum_accuracy"] for line in history]
    (model,) = folder.glob("mlruns/**/model")
    assert load_model(model)

    job = Job("examples/mlflow_callback", *train_flags(folder, "stopped"), **place)
    job.wait_until(lambda: runs_named("stopped"))
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code != 0
    assert runs_named("stopped")[0].info.status == "FAILED"


@pytest.mark.nightly
def test_tensorboard_has_each_epoch(cluster: str, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_example(folder, "tensorboard_callback", *train_flags(folder, "mine2"), address=cluster)
    events = EventAccumulator(str(folder / "tensorboard" / "mine2")).Reload()
    for line in history_of(folder / "runs" / "mine2"):
        values = {"train/loss": line["train_loss"]}
        for split in ("validation", "test"):
            values |= {f"{split}/{name}": value for name, value in line[split].items()}
        for tag, value in values.items():
            shown = {event.step: event.value for event in events.Scalars(tag)}
            assert shown[line["epoch"]] == pytest.approx(value), tag


@pytest.mark.nightly
def test_tune_reports_each_epoch_of_trials_by_name(cluster: str, folder: Path) -> None:
    flags = ["--data", folder / "rows.parquet", "--epochs", 2]
    out = run_example(folder, "tune", *flags, address=cluster)
    assert "'learning_rate': 0.0" in out.splitlines()[-1]
    trials = sorted(path.name for path in (folder / "tuned").iterdir())
    assert len(trials) == 2
    results = [*Path.home().glob(f"ray_results/*/{trials[0]}_*/result.json")]
    lines = [json.loads(line) for line in results[0].read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


@pytest.mark.nightly
def test_serve_answers_for_a_picture_and_says_what_is_wrong(folder: Path) -> None:
    port, picture = free_port(), (folder / "seven.png").read_bytes()
    server = Job("examples/serve", "runs/mine", port, cwd=folder)

    def ask(query: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{query}", body) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def is_up() -> bool:
        try:
            return ask("?number=5", picture)[0] == 200
        except (urllib.error.URLError, ValueError):
            time.sleep(0.5)
            return False

    server.wait_until(is_up)
    assert set(ask("?number=5", picture)[1]) == {"digit", "sum", "unsure"}
    wrong = [("?number=10", picture), ("?number=x", picture), ("", picture), ("?number=5", b"none")]
    answers = [ask(*request) for request in wrong]
    assert [status for status, _ in answers] == [422] * 4
    said = "cannot be read as a picture (UnidentifiedImageError); save it as PNG"
    assert answers[-1][1]["detail"].endswith(said)
    server.kill()


def test_photos_become_rows_and_one_that_is_missing_a_rejected_one(folder: Path) -> None:
    (folder / "photos.csv").write_text("file,number\nseven.png,5\nnone.png,3\n")
    run_example(folder, "photos", "photos.csv", "photos.parquet")
    seven, missing = pq.read_table(folder / "photos.parquet").to_pylist()
    assert (seven["file"], seven["number"], len(seven["image"])) == ("seven.png", 5, 784)
    assert (missing["number"], missing["image"]) == (3, None)


@pytest.mark.nightly
def test_a_delta_table_is_scored_without_the_rows_that_it_has_removed(
    cluster: str, folder: Path, sample: Any, pixels: Array
) -> None:
    from deltalake import write_deltalake

    ids, numbers = np.arange(len(sample)), np.arange(len(sample)) % 10
    pairs = sample.append_column("id", [ids]).append_column("number", [numbers])
    write_deltalake(folder / "pairs", pairs[:100])
    write_deltalake(folder / "pairs", pairs[200:220], mode="overwrite")
    write_deltalake(folder / "pairs", pairs[4000:4020], mode="append")
    run_example(
        folder, "dataset", "runs/mine", folder / "pairs", folder / "scored", address=cluster
    )
    scored = pq.read_table(folder / "scored").sort_by("id")
    rows = [*range(200, 220), *range(4000, 4020)]
    assert scored["id"].to_pylist() == rows
    model = folder / "runs" / "mine"
    check_predictions(scored, plain_predictions(model, pixels[rows], numbers[rows]))


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["train", "score"])
def test_the_benchmark_measures_five_ways(what: str) -> None:
    """A minute each."""
    ways = run_job("benchmark", what, "--rows", "600").line["rows_per_second"]
    assert list(ways) == ["original", "bare", "guide", "tuned", "project"]
    assert min(ways.values()) > 0


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["train", "score"])
def test_the_benchmark_measures_another_task(what: str) -> None:
    task = f"{ROOT}/jobs/examples/houses.py:Houses"
    ways = run_job("benchmark", what, "--rows", "600", "--task", task).line["rows_per_second"]
    assert list(ways) == ["bare", "guide", "tuned", "project"]
    assert min(ways.values()) > 0
