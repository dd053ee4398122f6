"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

import os
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


def check_error(config_class: type[JobConfig], argv: list[str], message: str) -> None:
    """Assert that a command line is refused in one line, which does not quote all of a long value."""
    with pytest.raises(RequestError) as error:
        parse(config_class, argv, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epochs", "3", "--use-gpu", "false", "--precision=bf16"], {"epochs": 3, "use_gpu": False, "precision": "bf16"}),
        (["--num-workers", "1,4"], {"num_workers": (1, 4)}),
        (["--skip-bad-rows", "--epochs", "2"], {"skip_bad_rows": True, "epochs": 2}),
        (["--skip-bad-rows", "--skip-bad-rows", "false"], {"skip_bad_rows": False}),
        (["--resume", "--name", "a"], {"resume": True, "name": "a"}),
        (["--data", "None", "--storage-path", "données/ü [1]"], {"data": "None", "storage_path": "données/ü [1]"}),
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
    ("config_class", "argv", "message"),
    [
        (TrainConfig, ["--epohs=3"], "--epohs: there is no such flag; did you mean --epochs? (--help lists them)"),
        (TrainConfig, ["--epochs", "0"], "--epochs: input should be greater than or equal to 1, got '0'"),
        (TrainConfig, ["--recipe", "shrt"], "--recipe: input should be 'quick', 'short' or 'long', got 'shrt'"),
        (TrainConfig, ["--num-workers", "4,2"], "--num-workers: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX"),
        (TrainConfig, ["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (TrainConfig, ["--resume"], "--resume: needs --name, the run to continue"),
        (TrainConfig, ["--resume", "a", "--name", "b"], "--resume: input should be a valid boolean"),
        (TrainConfig, ["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read: No such file"),
        (TrainConfig, ["--seed"], "Missing value for argument '--seed'"),
        (TrainConfig, ["--data", "a", LONG], "xxx…"),
        (PredictConfig, ["--number", "5", "--model", "m"], "PICTURE: required"),
        (ScoreConfig, [], "--model, --input, --output: required, on the command line or in the config file"),
        (ScoreConfig, [*SCORE[2:], "--input"], "--input: tuple should have at least 1 item"),
        (ScoreConfig, [*SCORE, "--number-column", "image"], "'image' cannot be both"),
    ],
)
def test_an_error_is_one_short_line_that_names_the_flag(config_class: type[JobConfig], argv: list[str], message: str) -> None:
    check_error(config_class, argv, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting; did you mean epochs?"),
        ("epochs: 0\n", "'epochs' of the config file: input should be greater than or equal to 1, got '0'"),
        ("- epochs\n", "must hold `key: value` lines"),
        ("batch-size: 64\nbatch_size: 128\n", "the key 'batch_size' is there twice"),
        (f"seed: {'[' * 1000}", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
        ("name: &a b\ndata: *a\n", "aliases are not taken; write the value again"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_so_is_one_that_names_the_key_of_the_config_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    check_error(TrainConfig, ["--config", str(tmp_path / "run.yaml")], message)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_error(TrainConfig, ["--config", str(tmp_path / "pipe")], "is not a regular file")


def test_what_yaml_1_1_reads_otherwise_than_it_looks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 010\nname: 2024-01-01\nprecision: null\nlearning_rate: 1e-2\nuse_gpu: yes\n")
    made = config("--config", str(tmp_path / "run.yaml"))
    assert (made.seed, made.name, made.precision, made.learning_rate, made.use_gpu) == (10, "2024-01-01", None, 0.01, True)


def test_every_flag_says_what_it_means() -> None:
    for config_class in (TrainConfig, ScoreConfig, PredictConfig):
        for name, field in config_class.model_fields.items():
            assert field.description
            assert field.default is not None or "[" in field.description, f"--{name} does not give its unset value"


def test_in_python_the_fields_are_those_of_the_flags() -> None:
    """mypy checks these lines without pydantic's plugin, and would call the `ignore` unused if it did not know the fields."""
    assert TrainConfig(data="sample", epochs=2, num_workers=(1, 4)).worker_range == (1, 4)
    assert ScoreConfig(model="runs/mine", input=("pairs/",), output="scored/").input == ("pairs/",)
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match="epohs"):
        TrainConfig(epohs=2)  # type: ignore[call-arg]
