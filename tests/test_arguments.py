"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

import inspect
from pathlib import Path

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "a description")


def test_flags() -> None:
    made = config("--epochs", "3", "--use-gpu", "false", "--num-workers", "2,4", "--precision", "bf16", "--seed", "9")
    assert (made.epochs, made.use_gpu, made.worker_range, made.precision, made.seed) == (3, False, (2, 4), "bf16", 9)
    assert config("--num-workers", "3").worker_range == (3, 3)
    assert config().worker_range is None


def test_the_command_line_overrides_the_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nuse_gpu: false\n")
    made = config("--config", str(file), "--epochs", "7")
    assert (made.epochs, made.batch_size, made.num_workers, made.use_gpu) == (7, 128, (1, 2), False)


def test_environment_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("NAME", "other")
    assert (config().seed, config().name) == (0, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epohs", "3"], "--epohs"),
        (["--epoch", "3"], "--epoch"),  # no guessing at abbreviations
        (["stray"], "stray"),
        (["--epochs", "0"], "--epochs: input should be greater than or equal to 1, got '0'"),
        (["--epochs", "many"], "--epochs: input should be a valid integer"),
        (["--precision", "fp8"], "--precision"),
        (["--precision", "int8"], "--precision"),  # for scoring alone
        (["--num-workers", "0"], "--num-workers"),
        (["--num-workers", "4,2"], "--num-workers"),
        (["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (["--num-workers", "[1,2"], "workers"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--name", "a/b"], "--name"),
        (["--resume"], "--resume: needs --name, the run to continue"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--seed"], "--seed"),
    ],
)
def test_an_error_is_one_line_that_names_the_flag(argv: list[str], message: str) -> None:
    with pytest.raises(RequestError) as error:
        config(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting"),
        ("epochs: 0\n", "'epochs' of the config file: input should be greater than or equal to 1, got 0"),
        ("- epochs\n", "must hold `key: value` lines"),
        ("epochs: [\n", "not YAML"),
        ("epochs: 3\nseed: 1\nepochs: 4\n", "the key 'epochs' is there twice"),
        ("batch-size: 64\nbatch_size: 128\n", "the key 'batch_size' is there twice"),
        ("config: other.yaml\n", "a config file cannot name another one"),
        ("seed: 1:30\n", "1:30 would be read as 90: write a decimal number"),
        ("learning_rate: 1:30.5\n", "1:30.5 would be read as 90.5: write a decimal number"),
        ("seed: 010\n", "010 would be read as 8: write a decimal number"),
    ],
)
def test_an_invalid_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(RequestError) as error:
        config("--config", str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        config("--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        if field.default is None:
            assert "[" in field.description, f"--{name} does not give its unset value"
    assert "None" not in text


@pytest.mark.parametrize(
    ("config_class", "groups"),
    [
        (TrainConfig, {"Training data": "data", "Recipe and optimization": "seed", "Run folder": "resume"}),
        (ScoreConfig, {"Input": "input", "Output": "overwrite", "Cluster and hardware": "num-workers"}),
    ],
)
def test_help_shows_flags_in_groups(
    config_class: type[JobConfig], groups: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(config_class, ["--help"], "")
    sections = capsys.readouterr().out.split("\n\n")
    for heading, flag in groups.items():
        (section,) = [section for section in sections if section.startswith(f"{heading}:\n")]
        assert f"  --{flag}" in section


def test_a_list_flag_takes_several_words_as_a_shell_expands_them() -> None:
    rest = ["--model", "m", "--output", "o"]
    names = ("a,b.parquet", "c d", "données/*.parquet", 'say "hi"', "back\\slash")
    for argv in (["--input", *names], ["--input", names[0], "--strict", *(f"--input={name}" for name in names[1:])]):
        assert parse(ScoreConfig, [*argv, *rest], "").input == names


def test_the_config_file_may_hold_one_input_or_several(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, expected in (("pairs", ("pairs",)), ("[a, b]", ("a", "b"))):
        path.write_text(f"input: {text}\nmodel: m\noutput: o\n")
        assert parse(ScoreConfig, ["--config", str(path)], "").input == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "a", "--output", "o"], "--model: is required"),
        (["--model", "m", "--output", "o"], "--input: is required"),
        (["--model", "m", "--output", "o", "--input"], "--input: needs a value"),
        (["--model", "m", "--output", "o", "--input", "i", "--number-column", "image"], "'image' cannot be both"),
    ],
)
def test_a_missing_required_flag_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse(ScoreConfig, argv, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"seed: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        (f"seed: {'[' * 3000}", "is not YAML"),
        (f"name: {'x' * 5000}", "key 'name' of the config file"),
        ("name: 2024-01-01", "key 'name' of the config file: input should be a valid string, got datetime.date(2024, 1, 1)"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
        ("name: \0", "not YAML"),
    ],
    ids=["long integer", "brackets", "long text", "date", "latin-1", "nul"],
)
def test_a_hostile_config_file_is_refused_in_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError) as error:
        parse(TrainConfig, ["--config", str(tmp_path / "run.yaml")], "")
    assert message in str(error.value)
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "9" * 5000],
        ["--num-workers", "[" * 3000],
        ["--num-workers", "[" * 3000 + "]" * 3000],
        ["--data", "a", "b" * 5000],
        ["--resume=" + "x" * 5000],
    ],
    ids=["long integer", "brackets", "closed brackets", "stray word", "long flag"],
)
def test_an_error_does_not_quote_a_long_command_line_in_full(flags: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        parse(TrainConfig, flags, "")
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("config_class", "given"), [(TrainConfig, ["--num-workers", "1,2"]), (ScoreConfig, ["--input", "a", "b,c"])]
)
def test_the_printed_config_is_one_that_config_takes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config_class: type[JobConfig], given: list[str]
) -> None:
    flags = [*given, *(["--model", "m", "--output", "o"] if config_class is ScoreConfig else [])]
    with pytest.raises(SystemExit) as done:
        parse(config_class, [*flags, "--print-config"], "")
    assert done.value.code == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text)
    assert parse(config_class, ["--config", str(tmp_path / "run.yaml")], "") == parse(config_class, flags, "")
    assert max(map(len, text.splitlines())) <= 100
    for name, field in config_class.model_fields.items():
        assert field.description
        assert f"\n{name}: " in f"\n{text}"
        assert field.description.split()[0] in text


def test_a_printed_config_leaves_required_settings_open(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ScoreConfig, ["--print-config"], "")
    text = capsys.readouterr().out
    assert "\n# model:  (required)\n" in text
    with pytest.raises(RequestError, match="--max-rows-per-file"):
        parse(ScoreConfig, ["--print-config", "--max-rows-per-file", "0"], "")


def test_help_of_a_config_lists_its_fields_with_their_meaning() -> None:
    for config_class in (TrainConfig, ScoreConfig):
        text = " ".join((inspect.getdoc(config_class) or "").split())
        for name, field in config_class.model_fields.items():
            assert f"{name}: {' '.join((field.description or '').split())} (" in text
    assert (inspect.getdoc(TrainConfig) or "").startswith("Config of a training run.")


def test_in_python_an_error_names_the_argument() -> None:
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match="`image_column`, `number_column`: 'a' cannot be both"):
        ScoreConfig(model="m", input=("i",), output="o", image_column="a", number_column="a")
