"""Scoring with a task of another kind: photos and floats, of which a price and a kind follow."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mnistsum_ray import predict_rows
from mnistsum_ray.data.columns import Integers, Numbers, Photos
from mnistsum_ray.data.columns.base import Arrays, Column
from mnistsum_ray.errors import RequestError, TaskError
from mnistsum_ray.model.folder import copy_weights, describe_model, write_model
from mnistsum_ray.reporting.results import ScoreResult
from mnistsum_ray.storage.uri import locate
from mnistsum_ray.task import Batch, Findings, Task
from mnistsum_ray.task_loader import code_of
from tests.scoring.conftest import CONSOLE, score

ROWS = 9


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1)

    def forward(self, batch: Batch) -> Tensor:
        colours = batch["photo"].float().mean((1, 2)) / 255
        values: Tensor = self.layer(torch.cat([batch["sizes"], colours], dim=1))
        return values.squeeze(1)


class Houses(Task):
    name = "houses"
    inputs: ClassVar[Mapping[str, Column]] = {"photo": Photos(8), "sizes": Numbers(2)}
    labels: ClassVar[Mapping[str, Column]] = {"price": Numbers(), "kind": Integers(3)}
    outputs = pa.schema({"pred_price": pa.float32(), "pred_kind": pa.int8()})
    bf16 = False

    def network(self) -> nn.Module:
        return Network()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["price"]) ** 2

    def predict(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"pred_price": outputs, "pred_kind": (outputs > 0).long()}

    def row_metrics(self, predicted: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        square = (predicted["pred_price"] - batch["price"]) ** 2
        return {"square": square, "kind_accuracy": predicted["pred_kind"] == batch["kind"]}

    def reduce_metrics(self, rows: int, sums: Mapping[str, float]) -> dict[str, float]:
        means = {name: total / rows for name, total in sums.items()}
        return {"rmse": means["square"] ** 0.5, "kind_accuracy": means["kind_accuracy"]}

    def count(self, predicted: Arrays, batch: Arrays) -> dict[str, Any]:
        counts: dict[str, Any] = {"pixels": batch["photo"].size, "any": True}
        counts["kinds"] = np.bincount(predicted["pred_kind"], minlength=3)
        if "kind" in batch:
            counts["true_kinds"] = torch.bincount(torch.tensor(batch["kind"]), minlength=3)
        return counts

    def describe(self, counts: Mapping[str, Any]) -> Findings:
        kinds = [(kind, f"{rows} of it") for kind, rows in enumerate(counts["kinds"])]
        return Findings(tables=[("Kinds", ("kind", "rows"), kinds)], notice="cheap houses")


def test_each_photo_is_decoded_once_also_with_labels_and_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    load_one = Photos._load_one

    def count(column: Photos, data: bytes) -> Any:
        opened.append(len(data))
        return load_one(column, data)

    monkeypatch.setattr(Photos, "_load_one", count)
    score_houses(folder, monkeypatch, **NAMED)
    assert len(opened) == 2 * ROWS
    opened.clear()
    rows = pq.read_table(folder / "in" / "0.parquet")
    assert predict_rows(Network(), rows, Houses)["reason"].null_count == ROWS - 2
    assert len(opened) == ROWS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, and two files of ROWS rows."""
    torch.manual_seed(0)
    weights = copy_weights(Network())
    description = describe_model(Houses(), weights, code_of(Houses))
    write_model(locate(f"{tmp_path}/m", "--model"), weights, description)
    (tmp_path / "in").mkdir()
    for file in range(2):
        names = ("id", "photo", "sizes", "price", "kind")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in range(ROWS):
            data = io.BytesIO()
            Image.new("RGB", (20 + row, 30), (20 * row, 99, 5)).save(data, "PNG")
            values = (row, data.getvalue(), [row, file - 0.5], row / 10, f"{row % 4}")
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
        columns["photo"][1], columns["sizes"][2], columns["price"][4] = b"no", [1.0], None
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{file}.parquet")
    return tmp_path


def score_houses(
    folder: Path, patch: pytest.MonkeyPatch, task: type[Task] | str = Houses, **given: Any
) -> ScoreResult:
    places = {"model": folder / "m", "input": folder / "in", "output": folder / "out"}
    return score(patch, task=task, max_rows_per_file=4, **places, **given)


NAMED = {"price_column": "price", "kind_column": "kind"}


def test_what_is_counted_and_measured_is_that_of_the_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = score_houses(folder, monkeypatch, **NAMED).line()
    paths = sorted((folder / "out" / "predictions").iterdir())
    rows = pa.concat_tables(pq.read_table(path) for path in paths)
    added = ["pred_price", "pred_kind", "reason"]
    assert rows.column_names == ["id", "sizes", "price", "kind", *added]
    assert rows["id"].to_pylist() == [*range(ROWS)] * 2
    good = rows.to_pandas().query("reason.isna()")
    known = good[good["price"].notna() & (good["kind"] != "3")]
    assert (len(good), len(known)) == (14, 8)
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "pixels": 14 * 8 * 8 * 3,
        "any": len([path for path in paths if pq.read_table(path)["reason"].null_count]),
        "kinds": np.bincount(good["pred_kind"].astype(int), minlength=3).tolist(),
        "true_kinds": np.bincount(known["kind"].astype(int), minlength=3).tolist(),
        "rows": 2 * ROWS,
        "rejected_rows": 4,
        "labelled_rows": 8,
    }
    square = (known["pred_price"] - known["price"]) ** 2
    assert line["rmse"] == pytest.approx(square.mean() ** 0.5)
    assert line["kind_accuracy"] == (known["pred_kind"] == known["kind"].astype(int)).mean()
    assert manifest["notice"] == "cheap houses"
    page = (folder / "out" / "report.html").read_text()
    assert f"<td>{manifest['counts']['kinds'][1]} of it</td>" in page
    assert score_houses(folder, monkeypatch, **NAMED).resumed_rows == 2 * ROWS


def raises(*_: Any) -> Any:
    raise KeyError("first line\nsecond")


def gives(value: Any) -> Callable[..., Any]:
    return lambda *_: {"x": value}


def ragged(_: Task, predicted: Arrays, batch: Arrays) -> dict[str, Any]:
    return {"x": [0] * len(batch["sizes"])}


def too_large(_: Task, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What a trial with four random rows does not show."""
    kinds = torch.where(batch["sizes"][:, 0] > 5, 1000, 0)
    return {"pred_price": outputs, "pred_kind": kinds}


def not_a_number(_: Task, predicted: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    square = torch.where(batch["sizes"][:, 0] > 5, torch.nan, 1.0)
    return {"square": square, "kind_accuracy": square}


BROKEN: list[tuple[str, Any, str]] = [
    ("count", raises, r"count raised KeyError: 'first line\\nsecond'"),
    (
        "count",
        gives(float("nan")),
        "count or row_metrics raised ValueError: Out of range float values",
    ),
    ("count", gives("seven"), "count raised .*: ufunc 'add' did not contain a loop"),
    ("count", ragged, "count raised ValueError: x has different lengths; give np.bincount"),
    (
        "row_metrics",
        not_a_number,
        "count or row_metrics raised ValueError: Out of range float values",
    ),
    ("predict", too_large, "predict raised ArrowInvalid: Integer value 1000 not in range"),
    ("describe", raises, "describe raised KeyError"),
]


@pytest.mark.parametrize(("method", "does", "said"), BROKEN)
def test_a_task_that_breaks_its_promises_ends_the_run_in_one_line(
    method: str, does: Any, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = type("Broken", (Houses,), {method: does})
    with pytest.raises(TaskError, match=f"^task houses: {said}"):
        score_houses(folder, monkeypatch, task, **NAMED)
    assert not (folder / "out" / "manifest.json").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"price_column": "price"}, "^--kind-column: metrics need all labels, so name this one too"),
    ({"precision": "bf16"}, "^--precision bf16: task houses needs fp32"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_flags_that_do_not_go_with_the_task_are_refused(
    given: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=said):
        score_houses(folder, monkeypatch, **given)
    assert not (folder / "out").exists()


def test_a_run_that_goes_on_with_other_code_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(CONSOLE, "say", lines.append)
    file = folder / "task.py"
    file.write_text("from tests.scoring.test_task import Houses as Base\nclass Mine(Base): pass\n")
    score_houses(folder, monkeypatch, f"{file}:Mine")
    assert f"--task {file}:Mine: its code has changed since the model was trained" in lines
    file.write_text(f"{file.read_text()}# Another line.\n")
    assert score_houses(folder, monkeypatch, f"{file}:Mine").resumed_rows == 2 * ROWS
