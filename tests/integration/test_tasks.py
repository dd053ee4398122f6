"""Tasks in files of their own have what README promises: any kill leaves the same bits, and each
row is counted. Those of jobs/examples, with two workers, and one of photos."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.jobs import ROOT, Done, Job, history_of, run_job, training

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "jobs" / "examples"
EPOCHS = 4


class Place:
    """A working folder with a copy of a task's file, rows, and new rows to score."""

    def __init__(self, folder: Path, name: str, class_name: str, label: str) -> None:
        self.folder, self.label, self.file = folder, label, folder / f"{name}.py"
        shutil.copy(EXAMPLES / self.file.name, folder)
        self.task: list[Any] = ["--task", f"{self.file}:{class_name}"]
        for rows, count in (("rows", 1500), ("new", 300)):
            command = [sys.executable, str(self.file), str(folder / rows), str(count)]
            subprocess.run(command, check=True)

    def train(self, runs: str, *flags: Any) -> list[Any]:
        """Name and flags of a job: a training with two workers, whose run is `mine`."""
        flags = ("--epochs", EPOCHS, "--num-workers", 2, "--threads", 1, *flags)
        return training(self.folder / "rows", self.folder / runs, *self.task, *flags)

    @property
    def labelled(self) -> list[str]:
        return [f"--{self.label}-column", self.label]

    def resume(self, *flags: Any) -> Done:
        runs = ["--storage-path", self.folder / "killed", "--name", "mine", "--resume"]
        return run_job("train", *runs, *flags, cwd=self.folder)

    def score(self, output: str, *flags: Any, runs: str = "calm") -> Done:
        where = ["--input", self.folder / "new", "--output", self.folder / output]
        model = self.folder / runs / "mine"
        return run_job("score", "--model", model, *where, *flags, cwd=self.folder)

    def trained_sha256(self, runs: str) -> Any:
        file = self.folder / runs / "mine" / "model" / "model.json"
        return json.loads(file.read_text())["trained_sha256"]


def error_of(done: Done) -> str:
    """The one line by which a request is refused."""
    assert (done.code, done.out) == (2, ""), done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    return line


TASKS = [("shapes", "Shapes", "shape"), ("houses", "Houses", "price")]


@pytest.mark.parametrize(("name", "class_name", "label"), TASKS)
def test_a_killed_training_has_the_same_bits_and_its_model_scores(
    tmp_path: Path, name: str, class_name: str, label: str
) -> None:
    place = Place(tmp_path, name, class_name, label)
    other = ["--task", f"{EXAMPLES / 'houses.py'}:Houses"]
    if name == "houses":
        other = ["--task", f"{EXAMPLES / 'shapes.py'}:Shapes"]
    calm = run_job(*place.train("calm"), cwd=tmp_path).line
    assert sum(calm["data"][f"{split}_rows"] for split in ("train", "validation", "test")) == 1500

    job = Job(*place.train("killed"), cwd=tmp_path)
    job.wait_until(lambda: [*tmp_path.glob("killed/mine/checkpoints/*/epoch_*/trainer.sha256")])
    job.kill()
    assert not (tmp_path / "killed" / "mine" / "model").exists(), "it was killed too late"
    assert "task" in error_of(place.resume()), "a file alone loads no code"
    assert "is of the task" in error_of(place.resume(*other))
    code = place.file.read_text()
    place.file.write_text(code + "\n# One line more.\n")
    assert "has changed since the run began; --changed-task true" in error_of(
        place.resume(*place.task)
    )
    place.file.write_text(code)
    assert place.resume(*place.task).line["test"] == calm["test"]
    assert place.trained_sha256("killed") == place.trained_sha256("calm")
    assert len(history_of(tmp_path / "killed" / "mine")) == EPOCHS

    line = place.score("out", *place.task, *place.labelled).line
    assert (line["input_rows"], line["scored_rows"], line["rejected_rows"]) == (300, 300, 0)
    if name == "shapes":
        assert line["accuracy"] > 0.3, "though it has seen few, each drawn anew"
    else:
        assert 0.05 < line["absolute_error"] < line["root_mean_square_error"] < 1
    columns = pq.read_table(tmp_path / "out" / "predictions").column_names
    assert columns[-1] == "reason"
    assert "image" not in columns
    assert f"its task is {name}, and not" in error_of(place.score("other", *other))


def test_a_run_whose_task_has_changed_goes_on_if_that_is_asked_for(tmp_path: Path) -> None:
    place = Place(tmp_path, "houses", "Houses", "price")
    job = Job(*place.train("killed", "--epochs", 15), cwd=tmp_path)
    job.wait_until(lambda: [*tmp_path.glob("killed/mine/checkpoints/*/epoch_*/trainer.sha256")])
    job.kill()
    place.file.write_text(place.file.read_text().replace("rows: int", "rows : int"))
    done = place.resume(*place.task, "--changed-task", "true")
    assert done.code == 0, done.err
    assert "has changed since the run began; the run goes on with it" in done.err
    place.file.write_text(place.file.read_text() + "\n")
    done = place.score("out", *place.task, *place.labelled, runs="killed")
    assert done.line["scored_rows"] == 300
    assert "has changed" in done.err


PHOTOS = '''
import pyarrow as pa
from torch import nn

from mnistsum_ray import Photos, Task, Whole


class Means(nn.Module):
    def forward(self, batch):
        return batch["photo"].float().mean((1, 2)) / 255


class Colours(Task):
    """Is a photo more red, more green or more blue?"""

    name = "colours"
    inputs = {"photo": Photos(224)}
    labels = {"colour": Whole(3)}
    outputs = pa.schema({"pred_colour": pa.int8()})

    def network(self):
        return nn.Sequential(Means(), nn.Linear(3, 3))

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["colour"], reduction="none")

    def predict(self, outputs, batch):
        return {"pred_colour": outputs.argmax(1)}

    def judge(self, predicted, batch):
        return {"accuracy": predicted["pred_colour"] == batch["colour"]}
'''


def write_photos(folder: Path, count: int, files: int = 2) -> None:
    """JPEGs of any size, of which one of three colours is stronger."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for file in range(files):
        photos, colours = [], random.integers(3, size=count // files)
        for colour in colours:
            small = random.integers(0, 150, (12, 16, 3))
            small[:, :, colour] += 100
            size = tuple(random.integers(200, 400, 2).tolist())
            data = io.BytesIO()
            Image.fromarray(small.astype(np.uint8)).resize(size).save(data, "JPEG")
            photos.append(data.getvalue())
        table = pa.table({"photo": photos, "colour": colours})
        pq.write_table(table, folder / f"{file}.parquet", row_group_size=500)


@pytest.mark.nightly
def test_photos_of_any_size_are_trained_on_and_scored(tmp_path: Path) -> None:
    """By hand, 20,000 of them."""
    (tmp_path / "colours.py").write_text(PHOTOS)
    write_photos(tmp_path / "rows", 600)
    task = ["--task", tmp_path / "colours.py:Colours"]
    flags = [*task, "--epochs", 2, "--learning-rate", 0.1]
    line = run_job(*training(tmp_path / "rows", tmp_path / "runs", *flags), cwd=tmp_path).line
    assert line["test"]["accuracy"] > 0.8
    where = ["--input", tmp_path / "rows", "--output", tmp_path / "out", "--colour-column"]
    done = run_job("score", *task, "--model", tmp_path / "runs" / "mine", *where, "colour")
    assert done.line["scored_rows"] == 600
    assert done.line["accuracy"] > 0.8
    assert pq.read_schema(next(tmp_path.glob("out/predictions/*"))).names == [
        "colour",
        "pred_colour",
        "reason",
    ]
