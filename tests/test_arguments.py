"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

import inspect
import pydoc
from pathlib import Path

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError

SCORE = ["--input", "i", "--model", "m", "--output", "o"]
LONG = "x" * 5000


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "a description")


def error_of(config_class: type[JobConfig], argv: list[str]) -> str:
    """The error of a command line, one line that does not quote all of a long value."""
    with pytest.raises(RequestError) as error:
        parse(config_class, argv, "")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


def test_flags() -> None:
    made = config(
        "--epochs", "3", "--use-gpu", "false", "--num-workers", "2,4", "--precision", "bf16", "--seed", "9", "--compile"
    )
    assert (made.epochs, made.use_gpu, made.worker_range, made.precision, made.seed) == (3, False, (2, 4), "bf16", 9)
    assert (made.compile, config().compile, config("--compile", "--no-compile").compile) == (True, False, False)
    resumes = [config("--name", "a", *flags).resume for flags in ([], ["--resume"], ["--resume", "auto"], ["--resume", "false"])]
    assert resumes == [False, True, "auto", False]
    assert config("--num-workers", "3").worker_range == (3, 3)
    assert config().worker_range is None


def test_the_command_line_overrides_the_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nuse_gpu: false\ncompile: true\n")
    made = config("--config", str(file), "--epochs", "7", "--no-compile")
    assert (made.epochs, made.batch_size, made.num_workers, made.use_gpu, made.compile) == (7, 128, (1, 2), False, False)


def test_environment_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("NAME", "other")
    assert (config().seed, config().name) == (0, None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epohs", "3"], "--epohs: there is no such flag; did you mean --epochs?"),
        (["--epoch", "3"], "--epoch"),  # no guessing at abbreviations
        (["stray"], "stray"),
        (["--epochs", "0"], "--epochs: input should be greater than or equal to 1, got '0'"),
        (["--epochs", "many"], "--epochs: input should be a valid integer"),
        (["--precision", "fp8"], "--precision"),
        (["--precision", "int8"], "--precision"),  # for scoring alone
        (["--num-workers", "0"], "--num-workers"),
        (["--num-workers", "4,2"], "--num-workers"),
        (["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (["--num-workers", "[" * 3000], "--num-workers"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--name", "a/b"], "--name"),
        (["--resume"], "--resume: needs --name, the run to continue"),
        (["--resume", "auto"], "--resume: needs --name, the run to continue"),
        (["--resume", "atuo", "--name", "a"], "got 'atuo'; did you mean auto?"),
        (["--resume", "--name", "a", "--from-run", "b"], "--from-run: starts a new run, and --resume continues one"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--seed"], "--seed"),
        (["--seed", "9" * 5000], "--seed"),
        (["--data", "a", LONG], "xxx…"),
        ([f"--resume={LONG}"], "--resume"),
    ],
)
def test_an_error_is_one_short_line_that_names_the_flag(argv: list[str], message: str) -> None:
    assert message in error_of(TrainConfig, argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (SCORE[:4], "--output: is required"),
        (SCORE[2:], "--input: is required"),
        (SCORE[:2], "--model, --output: are required"),
        ([*SCORE[2:], "--input"], "--input: needs a value"),
        ([*SCORE, "--number-column", "image"], "'image' cannot be both"),
    ],
)
def test_a_missing_required_flag_is_named(argv: list[str], message: str) -> None:
    assert message in error_of(ScoreConfig, argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting; did you mean epochs?"),
        ("epochs: 0\n", "'epochs' of the config file: input should be greater than or equal to 1, got 0"),
        ("epochs: yes\n", "'epochs' of the config file: must be no boolean, got True"),
        ("num-workers: off\n", "'num_workers' of the config file: must be no boolean, got False"),
        ("- epochs\n", "must hold `key: value` lines"),
        ("epochs: [\n", "not YAML"),
        ("epochs: 3\nseed: 1\nepochs: 4\n", "the key 'epochs' is there twice"),
        ("batch-size: 64\nbatch_size: 128\n", "the key 'batch_size' is there twice"),
        ("config: other.yaml\n", "a config file cannot name another one"),
        ("seed: 1:30\n", "1:30 would be read as 90: write a decimal number"),
        ("learning_rate: 1:30.5\n", "1:30.5 would be read as 90.5: write a decimal number"),
        ("seed: 010\n", "010 would be read as 8: write a decimal number"),
        (f"seed: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        (f"seed: {'[' * 3000}", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
        ("name: 2024-01-01", "key 'name' of the config file: input should be a valid string, got datetime.date(2024, 1, 1)"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
        ("name: \0", "not YAML"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_an_invalid_config_file_is_refused_in_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    assert message in error_of(TrainConfig, ["--config", str(file)])


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        config("--help-all")
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
        parse(config_class, ["--help-all"], "")
    sections = capsys.readouterr().out.split("\n\n")
    for heading, flag in groups.items():
        (section,) = [section for section in sections if section.startswith(f"{heading}:\n")]
        assert f"  --{flag}" in section


def test_a_list_flag_takes_several_words_as_a_shell_expands_them() -> None:
    names = ("a,b.parquet", "c d", "données/*.parquet", 'say "hi"', "back\\slash")
    for argv in (["--input", *names], ["--input", names[0], "--strict", *(f"--input={name}" for name in names[1:])]):
        assert parse(ScoreConfig, [*argv, *SCORE[2:]], "").input == names


def test_the_config_file_may_hold_one_input_or_several(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, expected in (("pairs", ("pairs",)), ("[a, b]", ("a", "b"))):
        path.write_text(f"input: {text}\nmodel: m\noutput: o\n")
        assert parse(ScoreConfig, ["--config", str(path)], "").input == expected


@pytest.mark.parametrize(
    ("config_class", "flags"), [(TrainConfig, ["--num-workers", "1,2"]), (ScoreConfig, ["--input", "a", "b,c", *SCORE[2:]])]
)
def test_the_printed_config_is_one_that_config_takes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config_class: type[JobConfig], flags: list[str]
) -> None:
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
    assert "\n# model:  (required)\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(PredictConfig, ["--print-config"], "")
    assert "\n# number:  (required)" in capsys.readouterr().out
    assert "--max-rows-per-file" in error_of(ScoreConfig, ["--print-config", "--max-rows-per-file", "0"])


def test_help_of_a_config_begins_with_its_fields_and_their_meaning() -> None:
    for config_class in (TrainConfig, ScoreConfig):
        text = " ".join((inspect.getdoc(config_class) or "").split())
        for name, field in config_class.model_fields.items():
            assert f"{name}: {' '.join((field.description or '').split())}" in text
    assert (inspect.getdoc(TrainConfig) or "").startswith("Config of a training run.")
    page = pydoc.plain(pydoc.render_doc(TrainConfig))
    assert len(page.partition("data: auto")[0]) < 1000, "the signature has names and defaults only"


def test_in_python_an_error_names_the_argument() -> None:
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match=r"epochs\s+Value error, must be no boolean"):
        TrainConfig(epochs=True)
    assert TrainConfig(compile=True, use_gpu=False, resume=True, name="a").compile
    with pytest.raises(ValueError, match="`image_column`, `number_column`: 'a' cannot be both"):
        ScoreConfig(model="m", input=("i",), output="o", image_column="a", number_column="a")
