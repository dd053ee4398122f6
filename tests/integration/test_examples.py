"""Each file of jobs/examples, jobs/benchmark.py, and the model of docs/python.md run."""

import io
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.data.columns.base import Array
from tests.conftest import plain_predictions, write_sample
from tests.jobs import ROOT, Job, free_port, history_of, run_job

# Libraries of one example are imported by its test: together they take seconds, in each process of
# the tests. What takes long runs at night; mypy knows the names that an example uses.
pytestmark = pytest.mark.slow

SEVEN = ROOT / "docs" / "pictures" / "seven.png"
ANSWERS = ("pred_digit", "digit_prob", "pred_sum", "sum_prob")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """The working folder, with the run runs/mine, the rows of a training, and a picture."""
    shutil.copytree(model, tmp_path / "runs" / "mine")
    write_sample(tmp_path / "rows.parquet", 500)
    shutil.copy(SEVEN, tmp_path)
    return tmp_path


def run_example(folder: Path, name: str, *args: object, **options: Any) -> str:
    """Run an example to its end; return its standard output."""
    done = run_job(f"examples/{name}", *args, cwd=folder, **options)
    assert done.code == 0, done.err
    return done.out


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
    others = session.run(ANSWERS, {"image": images[:1], "number": np.array([10])})
    assert (others[2].tolist(), np.isnan(others[3]).tolist()) == ([-1], [True])


def test_plain_pytorch_as_in_the_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "python.md").read_text()
    code = re.findall(r"```python\n(.*?)```", document, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["sum_logits"].shape == (3, 19)


@pytest.mark.nightly
def test_a_task_of_ones_own_counts_each_row_and_learns_the_same_when_it_is_killed(
    tmp_path: Path,
) -> None:
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    killed = Job("examples/own_task", cwd=tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "runs" / "own_task"
    killed.wait_until(lambda: len([*checkpoints.glob("checkpoint_*/state.pt")]) > 2)
    killed.kill()
    calm = run_example(tmp_path / "calm", "own_task").splitlines()[-1]
    assert calm.startswith("2 and 1 are learned as ")
    assert calm.endswith(" with all 1001 rows in each epoch")
    assert run_example(tmp_path / "killed", "own_task").splitlines()[-1] == calm


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("mlflow_callback", "mlruns/**/model.safetensors"),
        ("tensorboard_callback", "tensorboard/mine2/events*"),
        ("tune", "tuned/*/manifest.json"),
    ],
)
def test_a_training_that_others_follow(cluster: str, folder: Path, name: str, writes: str) -> None:
    flags: list[Any] = ["--data", folder / "rows.parquet", "--epochs", 2]
    if name != "tune":
        flags += ["--name", "mine2", "--threads", 1]
    out = run_example(folder, name, *flags, address=cluster)
    assert [*folder.glob(writes)], out
    if name == "mlflow_callback":
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs(["0"])
        logged = client.get_metric_history(run.info.run_id, "test/sum_accuracy")
        accuracies = [line["test"]["sum_accuracy"] for line in history_of(folder / "runs/mine2")]
        assert [entry.value for entry in logged] == accuracies


STROKES = {  # of each digit, in a square of 100 x 100, as a person draws it
    0: [[(50, 12), (28, 25), (22, 52), (32, 82), (52, 90), (72, 78), (78, 48), (68, 20), (50, 12)]],
    1: [[(50, 10), (50, 90)]],
    2: [[(26, 28), (40, 12), (62, 12), (74, 28), (66, 48), (24, 88), (78, 88)]],
    3: [[(28, 14), (60, 12), (72, 26), (64, 42), (46, 48), (66, 54), (76, 70), (62, 88), (26, 86)]],
    4: [[(32, 10), (26, 52), (72, 52)], [(70, 12), (66, 92)]],
    5: [[(74, 12), (34, 12), (30, 46), (58, 44), (74, 60), (68, 82), (46, 90), (24, 82)]],
    6: [[(62, 10), (38, 30), (27, 60), (34, 84), (54, 90), (70, 78), (68, 60), (50, 54), (30, 66)]],
    7: [[(24, 14), (76, 14), (60, 46), (46, 90)]],
    8: [[(68, 22), (50, 10), (32, 22), (64, 58), (70, 76), (50, 90), (30, 76), (38, 56), (68, 22)]],
    9: [[(70, 34), (56, 48), (36, 44), (32, 24), (48, 12), (68, 18), (70, 34), (66, 90)]],
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of draw.py, which answers with a model that has learned the sample."""
    trained = run_job("train", "--data", "sample", "--name", "mine", "--threads", 1, cwd=tmp_path)
    assert trained.code == 0, trained.err
    port, picture = free_port(), SEVEN.read_bytes()
    job, address = Job("examples/draw", "runs/mine", port, cwd=tmp_path), f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return ask(f"{address}/answer?number=5", picture)[0] == 200
        except (urllib.error.URLError, ValueError):
            time.sleep(0.5)
            return False

    job.wait_until(is_up)
    yield address
    job.kill()


def ask(address: str, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(address, body) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.nightly
def test_what_is_drawn_in_a_browser_is_recognized(server: str) -> None:
    """With real events of a pointer; what is wrong gets a line, of a server and of the page."""
    from playwright.sync_api import sync_playwright

    picture = SEVEN.read_bytes()
    found = ask(f"{server}/answer?number=5", picture)[1]
    assert (found["digit"], found["sum"]) == (7, 12)
    assert [len(found["digit_probs"]), len(found["sum_probs"])] == [10, 19]
    empty = io.BytesIO()
    Image.new("RGBA", (448, 448)).save(empty, "PNG")
    wrong = {
        "": picture,
        "?number=10": picture,
        "?number=5": b"none",
        "?number=6": empty.getvalue(),
    }
    answers = [ask(f"{server}/answer{query}", body) for query, body in wrong.items()]
    assert [code for code, _ in answers] == [422] * 4
    assert "cannot be read as a picture" in answers[2][1]["detail"]
    assert "nothing is drawn" in answers[3][1]["detail"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = chromium.new_page(viewport={"width": 400, "height": 900})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server)
        answer = page.locator("#answer")
        assert answer.inner_text() == "Draw a digit."
        box = page.locator("canvas").bounding_box()
        assert box
        assert box["width"] > 300
        right = 0
        for digit, strokes in STROKES.items():
            page.get_by_role("button", name="Clear").click()
            page.locator(f"input[value='{digit}']").check(force=True)
            for stroke in strokes:
                for index, (across, down) in enumerate(stroke):
                    x = box["x"] + across / 100 * box["width"]
                    y = box["y"] + down / 100 * box["height"]
                    page.mouse.move(x, y, steps=4)
                    if index == 0:
                        page.mouse.down()
                with page.expect_response("**/answer*"):
                    page.mouse.up()
            page.wait_for_function("document.querySelector('#answer').textContent[0] === 'I'")
            right += answer.inner_text() == f"It is {digit}, and {digit} + {digit} is {2 * digit}."
            assert page.locator("#digit .bar").count() + page.locator("#sum .bar").count() == 29
        assert right >= 9
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert all(url.startswith((server, "data:", "blob:")) for url in requests)
        chromium.close()


def test_photos_become_rows_and_one_that_is_missing_a_rejected_one(folder: Path) -> None:
    Image.new("L", (50, 50)).save(folder / "blank.png")
    (folder / "photos.csv").write_text("file,number\nseven.png,5\nnone.png,3\nblank.png,4\n")
    run_example(folder, "photos", "photos.csv", "photos.parquet")
    seven, missing, blank = pq.read_table(folder / "photos.parquet").to_pylist()
    assert (seven["file"], seven["number"], len(seven["image"])) == ("seven.png", 5, 784)
    assert (missing["number"], missing["image"], seven["problem"]) == (3, None, None)
    assert (blank["image"], "nothing is drawn on it" in blank["problem"]) == (None, True)


@pytest.mark.nightly
def test_a_delta_table_is_scored_without_the_rows_that_it_has_removed(
    cluster: str, folder: Path, sample: Any
) -> None:
    from deltalake import write_deltalake

    ids = np.arange(len(sample))
    pairs = sample.append_column("id", [ids]).append_column("number", [ids % 10])
    write_deltalake(folder / "pairs", pairs[:100])
    write_deltalake(folder / "pairs", pairs[200:220], mode="overwrite")
    paths: list[Any] = ["runs/mine", folder / "pairs", folder / "scored"]
    run_example(folder, "dataset", *paths, address=cluster)
    assert sorted(pq.read_table(folder / "scored")["id"].to_pylist()) == [*range(200, 220)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("what", "flags", "first"),
    [
        ("train", [], ["original"]),
        ("score", ["--task", f"{ROOT}/jobs/examples/houses.py:Houses"], []),
    ],
)
def test_the_benchmark_measures_each_way(what: str, flags: list[str], first: list[str]) -> None:
    ways = run_job("benchmark", what, "--rows", "600", *flags).line["rows_per_second"]
    assert list(ways) == [*first, "bare", "guide", "tuned", "project"]
    assert min(ways.values()) > 0
