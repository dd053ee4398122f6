"""The config of a job has its task's columns and settings, as fields and as flags."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mnistsum_ray import (
    Integers,
    Numbers,
    ScoreConfig,
    Settings,
    Task,
    TrainConfig,
    config_from_args,
)
from mnistsum_ray.errors import RequestError
from mnistsum_ray.task import BUILT_IN
from mnistsum_ray.task_loader import code_of, load_task, task_name
from tests.tasks import Points, PointSettings

HERE = Path(__file__).with_name("tasks.py")


def test_a_config_has_the_fields_of_its_task() -> None:
    config = TrainConfig(task=Points, data="d", hidden="5", side_column="x")
    assert (type(config).__name__, isinstance(config, TrainConfig)) == ("TrainConfig", True)
    assert (config.task, config.task_class) == ("tests.tasks:Points", Points)
    assert config.settings == PointSettings(hidden=5)
    assert config.columns == {"place": None, "side": "x"}
    assert config.flag_of("side") == "--side-column"
    assert type(TrainConfig(task="tests.tasks:Points", data="d")) is type(config)
    assert type(config).model_fields["hidden"].description == "width of the hidden layer"
    assert "dropout" not in TrainConfig.model_fields, "the class itself has no task"
    built_in = TrainConfig()
    assert (built_in.task, built_in.data, built_in.settings.recipe) == (BUILT_IN, "auto", None)
    assert built_in.flag_of("digit") == "--label-column"
    assert built_in.columns == {"image": None, "digit": None}, "a training draws the numbers"
    scoring = ScoreConfig(model="m", input="i", output="o")
    assert scoring.columns == {"image": None, "number": None, "digit": None}
    with pytest.raises(RequestError, match=r"^--hidden: there is no such setting"):
        ScoreConfig(task=Points, model="m", input="i", output="o", hidden=5)  # the model's is taken


def test_a_config_of_a_task_is_made_again_from_its_fields() -> None:
    config = TrainConfig(task=Points, data="d", hidden=5, epochs=2)
    again = config.model_copy()
    assert (again, type(again)) == (config, type(config))
    assert again.model_fields_set == {"task", "data", "hidden", "epochs"}
    assert TrainConfig(**config.model_dump(mode="json")) == config
    changed = config.model_copy(update={"dropout": 0.5})
    assert (changed.settings.dropout, config.settings.dropout) == (0.5, None)


@pytest.mark.parametrize("named", ["tests.tasks:Points", f"{HERE}:Points"])
def test_settings_and_columns_are_flags(named: str) -> None:
    settings = ["--hidden=5", "--kind", "deep", "--dropout", "0"]
    words = ["--place-column", "p", "--epochs", "3", "--data", "d", "--task", named]
    config = config_from_args(TrainConfig, settings + words)
    assert config.settings.model_dump() == {"hidden": 5, "kind": "deep", "dropout": 0}
    assert (config.columns["place"], config.epochs) == ("p", 3)
    assert config.task == named, "a file by its whole path"


def test_help_names_them_with_their_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_from_args(TrainConfig, ["--help", "--task", "tests.tasks:Points"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--side-column SIDE_COLUMN column of the side: whole numbers in 0..1 [side or " in text
    assert "--place-column PLACE_COLUMN column of the place: lists of 3 numbers [place]" in text
    assert "--hidden HIDDEN width of the hidden layer [8]" in text
    assert "--kind plain|deep kind of network [plain]" in text
    assert "--label-column" not in text


WRONG: list[tuple[list[str], str]] = [
    (["--recipe", "quick"], "--recipe: unknown flag"),
    (["--hiden", "5"], "--hiden: unknown flag; did you mean --hidden?"),
    (["--hidden", "0"], "--hidden: input should be greater than or equal to 1, got '0'"),
    (["--kind", "flat"], "--kind: input should be 'plain' or 'deep', got 'flat'"),
    (["--label-column", "x"], "--label-column: unknown flag"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_a_setting_that_the_task_has_not_is_refused_in_one_line(
    flags: list[str], said: str
) -> None:
    with pytest.raises(RequestError) as error:
        config_from_args(TrainConfig, ["--data", "d", "--task", "tests.tasks:Points", *flags])
    assert str(error.value).startswith(said)


def test_a_config_file_names_no_task(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: tests.tasks:Points\ndata: d\n")
    said = r"^key 'task' of the config file: give it as --task: no code is loaded because a file"
    with pytest.raises(RequestError, match=said):
        config_from_args(TrainConfig, ["--config", f"{tmp_path / 'run.yaml'}"])
    (tmp_path / "run.yaml").write_text("hidden: 3\ndata: d\n")
    words = ["--config", f"{tmp_path / 'run.yaml'}", "--task", "tests.tasks:Points"]
    assert config_from_args(TrainConfig, words).settings.hidden == 3


class NoTask:
    pass


class Clash(Settings):
    epochs: int = 3


def changed(**attributes: Any) -> Any:
    return type("Changed", (Points,), attributes)


TASKS: list[tuple[Any, str]] = [
    (NoTask, "is not a subclass of mnistsum_ray.Task"),
    (Task, "lacks the method network"),
    ("Points", "must be file.py:Class or module:Class"),
    ("no.py:Points", "there is no file no.py"),
    ("no.module:Points", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
    ("tests.tasks:Point", "there is no class Point in tests.tasks; did you mean Points?"),
    ("tests.tasks:points", "there is no class points in tests.tasks"),
    (changed(name=""), "name is '', and must be a text"),
    (changed(inputs={}), "inputs is {}, and must be a dict of columns"),
    (changed(labels={"side": 2}), "column 'side' is 2, and must be Images, Integers, …"),
    (
        changed(labels={"place": Integers(2)}),
        "column 'place' is there twice, in inputs and in labels",
    ),
    (changed(labels={"path": Integers(2)}), "no column may be row_id, reason or path, which"),
    (changed(outputs=pa.schema({})), "must be a pyarrow.schema with a field or more"),
    (changed(outputs=pa.schema({"reason": pa.int8()})), "outputs has 'reason', which scoring adds"),
    (
        changed(outputs=pa.schema({"pred_side": pa.string()})),
        "outputs has 'pred_side', which may be text only if it is pred_LABEL of a label of Classes",
    ),
    (changed(Settings=dict), "Settings must be a subclass of mnistsum_ray.Settings"),
    (changed(Settings=Clash), "two flags are --epochs; rename one"),
    (changed(labels={"data": Numbers(flag="data")}), "two flags are --data; rename one"),
]


@pytest.mark.parametrize(("task", "said"), TASKS)
def test_what_is_no_task_is_refused_in_one_line(task: Any, said: str) -> None:
    with pytest.raises(RequestError) as error:
        TrainConfig(task=task, data="d")
    assert str(error.value).startswith("--task ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_loaded_once_while_it_stays_as_it_is_and_its_code_tells_versions_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.tasks import Points\nclass Mine(Points):\n    name = 'mine'\n")
    monkeypatch.chdir(tmp_path)
    first = load_task("mine.py:Mine")
    assert load_task(f"{file}:Mine") is first is load_task(first)
    assert task_name(first) == f"{file}:Mine"
    file.write_text(file.read_text() + "# changed\n")
    second = load_task("mine.py:Mine")
    assert second is not first
    assert len({code_of(first), code_of(Points), code_of(load_task(BUILT_IN))}) == 3
    before = {*sys.modules}
    file.write_text("1 / 0\n")
    with pytest.raises(RequestError, match=r"cannot be imported: ZeroDivisionError: division by"):
        load_task("mine.py:Mine")
    assert {*sys.modules} == before, "half a module stays nowhere"
