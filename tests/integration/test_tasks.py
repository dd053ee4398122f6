"""Tasks in files of their own have what README promises: any kill leaves the same bits, and each
row is counted. Those of jobs/examples, with two workers, and one of photos."""

import io
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mnistsum_ray.errors import RequestError
from tests.integration.conftest import score_here, train_here
from tests.jobs import ROOT, Job, history_of, training

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "jobs" / "examples"
EPOCHS = 4


def write_rows(task: str, folder: Path, count: int) -> None:
    """Let the file of a task write so many rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [task, str(folder), str(count)])
        runpy.run_path(str(EXAMPLES / f"{task}.py"), run_name="__main__")


def refusal(run: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(RequestError) as refused:
        run(*args, **settings)
    return str(refused.value)


def trained_sha256(run: Path) -> Any:
    return json.loads((run / "model" / "model.json").read_text())["trained_sha256"]


TASKS = [
    ("shapes", "Shapes", "shape"),
    pytest.param("houses", "Houses", "price", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "class_name", "label"), TASKS)
def test_a_killed_training_has_the_same_bits_and_its_model_scores(
    cluster: str, tmp_path: Path, name: str, class_name: str, label: str
) -> None:
    """The file of shapes has changed meanwhile, by a comment."""
    file = Path(shutil.copy(EXAMPLES / f"{name}.py", tmp_path))
    task, rows = f"{file}:{class_name}", tmp_path / "rows"
    write_rows(name, rows, 1500)
    write_rows(name, tmp_path / "new", 300)
    settings: dict[str, Any] = {"task": task, "data": rows, "epochs": EPOCHS}
    settings |= {"num_workers": 2, "threads": 1, "name": "mine"}
    calm = train_here(**settings, storage_path=tmp_path / "calm")
    counts = calm.line["data"]
    assert sum(counts[f"{split}_rows"] for split in ("train", "validation", "test")) == 1500

    killed = tmp_path / "killed"
    flags = ["--task", task, "--epochs", EPOCHS, "--num-workers", 2, "--threads", 1]
    job = Job(*training(rows, killed, *flags), address=cluster)
    job.wait_until(lambda: [*killed.glob("mine/checkpoints/*/epoch_*/trainer.sha256")])
    job.kill()
    assert not (killed / "mine" / "model").exists(), "it was killed too late"
    again: dict[str, Any] = {"storage_path": killed, "name": "mine", "resume": True}
    assert "task" in refusal(train_here, **again), "a file alone loads no code"
    if name == "shapes":
        file.write_text(file.read_text() + "\n# One line more.\n")
    resumed = train_here(**again, task=task)
    described = json.loads((killed / "mine" / "manifest.json").read_text())["task"]
    for sign in (
        "the run continues, with metrics of both" in resumed.said,
        "earlier_codes" in described,
    ):
        assert sign == (name == "shapes")
    assert resumed.line["test"] == calm.line["test"]
    assert trained_sha256(killed / "mine") == trained_sha256(tmp_path / "calm" / "mine")
    assert len(history_of(killed / "mine")) == EPOCHS

    scoring: list[Any] = [killed / "mine", tmp_path / "out", tmp_path / "new"]
    line = score_here(*scoring, task=task, **{f"{label}_column": label}).line
    assert (line["input_rows"], line["scored_rows"], line["rejected_rows"]) == (300, 300, 0)
    if name == "shapes":
        assert line["accuracy"] > 0.3, "though it has seen few, each drawn anew"
    else:
        assert 0.05 < line["absolute_error"] < line["root_mean_square_error"] < 1
    columns = pq.read_table(tmp_path / "out" / "predictions").column_names
    assert columns[-1] == "reason"
    assert "image" not in columns
    assert f"its task is {name}, and not" in refusal(score_here, *scoring)


PHOTOS = '''
import pyarrow as pa
from torch import nn

from mnistsum_ray import Photos, Task, Integers


class Means(nn.Module):
    def forward(self, batch):
        return batch["photo"].float().mean((1, 2)) / 255


class Colours(Task):
    """Is a photo more red, more green or more blue?"""

    name = "colours"
    inputs = {"photo": Photos(224)}
    labels = {"colour": Integers(3)}
    outputs = pa.schema({"pred_colour": pa.int8()})

    def network(self):
        return nn.Sequential(Means(), nn.Linear(3, 3))

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["colour"], reduction="none")

    def predict(self, outputs, batch):
        return {"pred_colour": outputs.argmax(1)}

    def row_metrics(self, predicted, batch):
        return {"accuracy": predicted["pred_colour"] == batch["colour"]}
'''


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of any size, of which one of three colours is stronger."""
    random = np.random.default_rng(0)
    photos, colours = [], random.integers(3, size=count)
    for colour in colours:
        small = random.integers(0, 150, (12, 16, 3))
        small[:, :, colour] += 100
        size = tuple(random.integers(200, 400, 2).tolist())
        data = io.BytesIO()
        Image.fromarray(small.astype(np.uint8)).resize(size).save(data, "JPEG")
        photos.append(data.getvalue())
    folder.mkdir()
    table = pa.table({"photo": photos, "colour": colours})
    pq.write_table(table, folder / "rows.parquet", row_group_size=100)


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
def test_photos_of_any_size_are_trained_on_and_scored(tmp_path: Path) -> None:
    """By hand, 20,000 of them."""
    (tmp_path / "colours.py").write_text(PHOTOS)
    rows, task = tmp_path / "rows", f"{tmp_path}/colours.py:Colours"
    write_photos(rows, 600)
    settings: dict[str, Any] = {"task": task, "epochs": 2, "learning_rate": 0.1}
    trained = train_here(data=rows, storage_path=tmp_path / "runs", **settings).line
    assert trained["test"]["accuracy"] > 0.8
    line = score_here(
        trained["run"], tmp_path / "out", rows, task=task, colour_column="colour"
    ).line
    assert line["scored_rows"] == 600
    assert line["accuracy"] > 0.8
    names = pq.read_schema(next(tmp_path.glob("out/predictions/*"))).names
    assert names == ["colour", "pred_colour", "reason"]
