"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError

SCORE = ["--input", "i", "--model", "m", "--output", "o"]
LONG = "x" * 5000


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "a description")


def check_error(kind: type[JobConfig], argv: list[str], message: str) -> None:
    """Assert that a command line is refused in one line, which quotes no long value whole."""
    with pytest.raises(RequestError) as error:
        parse(kind, argv, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epochs", "3", "--precision=bf16"], {"epochs": 3, "precision": "bf16"}),
        (["--use-gpu", "false"], {"use_gpu": False}),
        (["--num-workers", "1,4"], {"num_workers": (1, 4)}),
        (["--skip-bad-rows", "--epochs", "2"], {"skip_bad_rows": True, "epochs": 2}),
        (["--skip-bad-rows", "--skip-bad-rows", "false"], {"skip_bad_rows": False}),
        (["--resume", "--name", "a"], {"resume": True, "name": "a"}),
        (["--data", "None", "--name", "a"], {"data": "None", "name": "a"}),
        (["--storage-path", "données/ü [1]"], {"storage_path": "données/ü [1]"}),
    ],
)
def test_flags(argv: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "NAME", "seed"):  # which are no settings of this program
        monkeypatch.setenv(name, "7")
    assert config(*argv).model_dump(exclude_unset=True) == expected


def test_the_command_line_overrides_the_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nskip_bad_rows: true\n")
    made = config("--config", str(file), "--epochs", "7", "--skip-bad-rows", "false")
    expected = {"epochs": 7, "batch_size": 128, "num_workers": (1, 2), "skip_bad_rows": False}
    assert made.model_dump(exclude_unset=True) == expected


def test_a_list_flag_takes_several_words_and_may_come_again(tmp_path: Path) -> None:
    names = ("a,b.parquet", "données/*.parquet", 'say "hi"', "[x]")
    again = ["--input", names[0], "--strict", *(f"--input={name}" for name in names[1:])]
    for argv in (["--input", *names], again):
        assert parse(ScoreConfig, [*argv, *SCORE[2:]], "").input == names
    path = tmp_path / "run.yaml"
    for text, expected in (("pairs", ("pairs",)), ("[a, 'b,c']", ("a", "b,c"))):
        path.write_text(f"input: {text}\nmodel: m\noutput: o\n")
        assert parse(ScoreConfig, ["--config", str(path)], "").input == expected


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        (TrainConfig, ["--epohs=3"], "--epohs: there is no such flag; did you mean --epochs?"),
        (TrainConfig, ["--epochs", "0"], "--epochs: input should be greater than or equal to 1"),
        (TrainConfig, ["--recipe", "a"], "--recipe: input should be 'quick', 'short' or 'long'"),
        (TrainConfig, ["--num-workers", "4,2"], "--num-workers: must be N >= 1, or MIN,MAX with 1"),
        (TrainConfig, ["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (TrainConfig, ["--resume"], "--resume: needs --name, the run to continue"),
        (TrainConfig, ["--resume", "a"], "--resume: input should be a valid boolean"),
        (TrainConfig, ["--config", "no.yaml"], "--config no.yaml: cannot be read: No such file"),
        (TrainConfig, ["--seed"], "Missing value for argument '--seed'"),
        (TrainConfig, ["--data", "a", LONG], "xxx…"),
        (PredictConfig, ["--number", "5", "--model", "m"], "PICTURE: required"),
        (ScoreConfig, [], "--model, --input, --output: required, on the command line or in the"),
        (ScoreConfig, [*SCORE[2:], "--input"], "--input: tuple should have at least 1 item"),
        (ScoreConfig, [*SCORE, "--number-column", "image"], "'image' cannot be both"),
    ],
)
def test_an_error_is_one_short_line(kind: type[JobConfig], argv: list[str], message: str) -> None:
    """It names the flag."""
    check_error(kind, argv, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting; did you mean epo"),
        ("epochs: 0\n", "'epochs' of the config file: input should be greater than or equal to"),
        ("- epochs\n", "must hold `key: value` lines"),
        (f"seed: {'[' * 1000}", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_so_is_one_of_the_config_file(tmp_path: Path, text: str, message: str) -> None:
    """It names the key."""
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    check_error(TrainConfig, ["--config", str(tmp_path / "run.yaml")], message)


def test_what_yaml_1_1_reads_otherwise_than_it_looks(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 010\nname: 2024-01-01\nprecision: null\ndropout: 1e-2\nuse_gpu: yes\n")
    made = config("--config", str(file)).model_dump(exclude_unset=True)
    values = {"seed": 10, "name": "2024-01-01", "precision": None, "dropout": 0.01, "use_gpu": True}
    assert made == values


def test_every_flag_says_what_it_means() -> None:
    for config_class in (TrainConfig, ScoreConfig, PredictConfig):
        for name, field in config_class.model_fields.items():
            assert field.description
            assert field.default is not None or "[" in field.description, name


def test_in_python_the_fields_are_those_of_the_flags() -> None:
    """mypy knows them, or it would call the `ignore` unused."""
    assert TrainConfig(data="sample", epochs=2, num_workers=(1, 4)).worker_range == (1, 4)
    assert ScoreConfig(model="runs/mine", input=("pairs/",), output="scored/").strict is False
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match="epohs"):
        TrainConfig(epohs=2)  # type: ignore[call-arg]
