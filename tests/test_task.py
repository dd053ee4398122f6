"""A task that is none, or breaks a promise: one line, exit code 2, and nothing is written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.cli import main

GOOD = """
import pyarrow as pa
from torch import nn

from mnistsum_ray import Numbers, Settings, Task, Integers


class Plain(Task):
    name = "plain"
    inputs = {"x": Numbers(3)}
    labels = {"y": Integers(2)}
    outputs = pa.schema({"pred_y": pa.int8()})

    def network(self):
        return First(nn.Linear(3, 2))

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["y"], reduction="none")

    def predict(self, outputs, batch):
        return {"pred_y": outputs.argmax(1)}

    def row_metrics(self, predicted, batch):
        return {"accuracy": predicted["pred_y"] == batch["y"]}


class First(nn.Sequential):
    def forward(self, batch):
        return super().forward(batch["x"])
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of forty rows."""
    folder = tmp_path / "rows"
    folder.mkdir()
    places = [*np.random.default_rng(0).random((40, 3), np.float32)]
    pq.write_table(pa.table({"x": places, "y": [0, 1] * 20}), folder / "rows.parquet")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    return folder


def refusal(folder: Path, code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses a task of this code, which is `Plain` in task.py."""
    file = folder / "task.py"
    file.write_text(code)
    runs = folder / "runs"
    flags = ["--task", f"{file}:Plain", "--data", f"{folder}/rows", "--storage-path", f"{runs}"]
    assert main(["train", *flags]) == 2
    assert not runs.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def method(name: str, body: str, arguments: str = "self, outputs, batch") -> str:
    """More code of the class: another method of this name."""
    return f"\n    def {name}({arguments}):\n        {body}\n"


NUMBERS = '{"epochs": 1, "batch_size": 8, "learning_rate": 0.1'
AUGMENT = ("self, batch, draws", "task plain: augment ")
MORE: list[tuple[str, str]] = [
    (method("loss", "return outputs.mean()"), "task plain: loss must return a tensor of "),
    (method("network", "return 1 / 0", "self"), "task plain: network raised ZeroDivisionError: "),
    (method("augment", "return 1 / 0", AUGMENT[0]), f"{AUGMENT[1]}raised ZeroDivisionError: "),
    (
        method("augment", "return {'x': batch['x']}", AUGMENT[0]),
        f"{AUGMENT[1]}must return all columns",
    ),
    (
        method("augment", "return batch | {'x': batch['x'][1:]}", AUGMENT[0]),
        "augment['x'] must be an array",
    ),
    (method("augment", "return None", AUGMENT[0]), f"{AUGMENT[1]}must return a dict of arrays"),
    (method("evaluate", "return 1 / 0", "self, *_"), "task plain: evaluate raised ZeroDivision"),
    (method("defaults", "return {'batch_size': 8}", "self, rows"), "defaults must have 'epochs'"),
    (method("defaults", f"return {NUMBERS}, 'z': 1}}", "self, rows"), "defaults has 'z', which is"),
    (method("defaults", "return 1 / 0", "self, rows"), "task plain: defaults raised ZeroDivision"),
    ("    inputs = {'x': 3}\n", "task.py:Plain: column 'x' is 3, and must be Images, Integers, …"),
]


@pytest.mark.parametrize(("more", "said"), MORE)
def test_a_broken_promise_is_refused_before_anything_is_written(
    rows: Path, more: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = GOOD.replace("\n\n\nclass First", f"\n{more}\n\nclass First")
    assert said in refusal(rows.parent, code, capsys)


CHANGED: list[tuple[str, str, str]] = [
    ("    def network(", "    def networks(", "task.py:Plain: lacks the method network"),
    ("import pyarrow", "import no_such_module as", "cannot be imported: SyntaxError: "),
    ('"x": Numbers(3)', '"z": Numbers(3)', "z"),  # a column that no file has
]


@pytest.mark.parametrize(("old", "new", "said"), CHANGED)
def test_what_is_no_whole_task_is_refused(
    rows: Path, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(rows.parent, GOOD.replace(old, new), capsys)
