"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError

SCORE = ["--input", "i", "--model", "m", "--output", "o"]
LONG = "x" * 5000


def check_error(kind: type[JobConfig], argv: list[str], message: str) -> None:
    """Assert that a command line is refused in one line, which quotes no long value whole."""
    with pytest.raises(RequestError) as error:
        parse(kind, argv)
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
        (["--resume", "--name", "a"], {"resume": True, "name": "a"}),
        (["--resume", "auto", "--name", "None"], {"resume": "auto", "name": "None"}),
        (["--storage-path", "données/ü [1]"], {"storage_path": "données/ü [1]"}),
    ],
)
def test_flags(argv: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("data", "7")  # which is no setting of this program
    assert parse(TrainConfig, argv).model_dump(exclude_unset=True) == expected


def test_the_command_line_overrides_the_config_file(tmp_path: Path) -> None:
    """Its values are texts as on the command line: YAML 1.1 reads some otherwise than they look."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nskip_bad_rows: yes\nseed: 010\n"
        "name: 2024-01-01\nprecision: null\ndropout: 1e-2\n"
    )
    made = parse(TrainConfig, ["--config", str(file), "--epochs", "7", "--skip-bad-rows", "false"])
    expected = {"epochs": 7, "batch_size": 128, "num_workers": (1, 2), "skip_bad_rows": False}
    expected |= {"seed": 10, "name": "2024-01-01", "precision": None, "dropout": 0.01}
    assert made.model_dump(exclude_unset=True) == expected


def test_a_list_flag_takes_several_words_and_may_come_again(tmp_path: Path) -> None:
    names = ("a,b.parquet", "données/*.parquet", 'say "hi"', "[x]")
    again = ["--input", *names[:2], "--strict", *(f"--input={name}" for name in names[2:])]
    for argv in (["--input", *names], again):
        assert parse(ScoreConfig, [*argv, *SCORE[2:]]).input == names
    path = tmp_path / "run.yaml"
    for text, expected in (("pairs", ("pairs",)), ("[a, 'b,c']", ("a", "b,c"))):
        path.write_text(f"input: {text}\nmodel: m\noutput: o\n")
        assert parse(ScoreConfig, ["--config", str(path)]).input == expected


@pytest.mark.parametrize(
    ("kind", "argv", "message"),
    [
        (TrainConfig, ["--epohs=3"], "--epohs: there is no such flag; did you mean --epochs?"),
        (
            TrainConfig,
            ["--epochs", "0", "--seed", "a"],
            "equal to 1, got '0'; --seed: input should",
        ),
        (
            TrainConfig,
            ["--num-workers", "a"],
            ", or input should be a valid tuple, got 'a'",
        ),
        (TrainConfig, ["--num-workers", "4,2"], "--num-workers: must be N >= 1, or MIN,MAX with 1"),
        (TrainConfig, ["--resume"], "--resume: needs --name, the run to continue"),
        (TrainConfig, ["--config", "no.yaml"], "no.yaml: is not there"),
        (TrainConfig, ["--data", "a", LONG], "xxx…"),
        (PredictConfig, ["--number", "5", "--model", "m"], "PICTURE: required"),
        (ScoreConfig, [], "--model, --input, --output: required, on the command line or in the"),
    ],
)
def test_a_wrong_flag_is_one_short_line(
    kind: type[JobConfig], argv: list[str], message: str
) -> None:
    """It names the flag."""
    check_error(kind, argv, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting; did you mean epo"),
        ("- epochs\n", "must hold `key: value` lines"),
        ("seed: [", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
    ],
)
def test_a_wrong_config_file_is_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    """It names the key."""
    (tmp_path / "run.yaml").write_text(text)
    check_error(TrainConfig, ["--config", str(tmp_path / "run.yaml")], message)


def test_in_python_the_fields_are_those_of_the_flags() -> None:
    """mypy knows them, or it would call the `ignore` unused."""
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match="epohs"):
        TrainConfig(epohs=2)  # type: ignore[call-arg]
