"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

import pydoc
import re
from pathlib import Path

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError

SCORE = ["--input", "i", "--model", "m", "--output", "o"]
LONG = "x" * 5000


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "a description")


def printed(capsys: pytest.CaptureFixture[str], config_class: type[JobConfig], *argv: str) -> str:
    """What a command line prints that makes no config."""
    with pytest.raises(SystemExit) as done:
        parse(config_class, list(argv), "")
    assert done.value.code == 0
    return capsys.readouterr().out


def check_error(config_class: type[JobConfig], argv: list[str], message: str) -> None:
    """Assert that a command line is refused in one line, which does not quote all of a long value."""
    with pytest.raises(RequestError) as error:
        parse(config_class, argv, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_flags() -> None:
    made = config("--epochs", "3", "--use-gpu", "false", "--num-workers", "2,4", "--precision", "bf16", "--compile")
    assert (made.epochs, made.use_gpu, made.worker_range, made.precision) == (3, False, (2, 4), "bf16")
    assert (made.compile, config().compile, config("--compile", "--no-compile").compile) == (True, False, False)
    resumes = [config("--name", "a", *flags).resume for flags in ([], ["--resume"], ["--resume", "auto"], ["--resume", "false"])]
    assert resumes == [False, True, "auto", False]
    assert (config("--num-workers", "3").worker_range, config().worker_range) == ((3, 3), None)


def test_the_command_line_overrides_the_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nuse_gpu: false\ncompile: true\n")
    made = config("--config", str(file), "--epochs", "7", "--no-compile")
    assert (made.epochs, made.batch_size, made.num_workers, made.use_gpu, made.compile) == (7, 128, (1, 2), False, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epohs=3"], "--epohs: there is no such flag; did you mean --epochs? (--help-all lists them)"),
        (["--epoch", "3"], "--epoch: there is no such flag"),  # no guessing at abbreviations
        (["stray"], "stray"),
        (["--epochs", "0"], "--epochs: input should be greater than or equal to 1, got '0'"),
        (["--recipe", "shrt"], "--recipe: input should be 'quick', 'short' or 'long', got 'shrt'; did you mean short?"),
        (["--precision", "int8"], "--precision"),  # for scoring alone
        (["--num-workers", "0"], "--num-workers: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX"),
        (["--num-workers", "4,2"], "--num-workers"),
        (["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--name", "a/b"], "--name"),
        (["--resume"], "--resume: needs --name, the run to continue"),
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
    check_error(TrainConfig, argv, message)


def test_the_picture_is_named_without_dashes() -> None:
    check_error(PredictConfig, ["--number", "5", "--model", "m"], "PICTURE: is required")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model, --input, --output: are required, on the command line or in the config file (--help has examples)"),
        (SCORE[:4], "--output: is required"),
        ([*SCORE[2:], "--input"], "--input: needs a value"),
        ([*SCORE, "--number-column", "image"], "'image' cannot be both"),
        (["--print-config", "--max-rows-per-file", "0"], "--max-rows-per-file"),
    ],
)
def test_so_is_an_error_in_scoring(argv: list[str], message: str) -> None:
    check_error(ScoreConfig, argv, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohs: 3\n", "'epohs' of the config file: there is no such setting; did you mean epochs?"),
        ("epochs: 0\n", "'epochs' of the config file: input should be greater than or equal to 1, got 0"),
        ("epochs: yes\n", "'epochs' of the config file: must be no boolean, got True"),
        ("- epochs\n", "must hold `key: value` lines"),
        ("epochs: [\n", "not YAML"),
        ("batch-size: 64\nbatch_size: 128\n", "the key 'batch_size' is there twice"),
        ("config: other.yaml\n", "a config file cannot name another one"),
        ("seed: 1:30\n", "1:30 would be read as 90: write a decimal number"),
        ("learning_rate: 1:30.5\n", "1:30.5 would be read as 90.5: write a decimal number"),
        ("seed: 010\n", "010 would be read as 8: write a decimal number"),
        (f"seed: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        (f"seed: {'[' * 1000}", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
        ("name: 2024-01-01", "key 'name' of the config file: input should be a valid string, got datetime.date(2024, 1, 1)"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_an_invalid_config_file_is_refused_in_one_short_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    check_error(TrainConfig, ["--config", str(file)], message)


def test_help_shows_the_flags_of_every_day_and_all_when_asked_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, TrainConfig, "--help-all")
    shown, everything = (re.findall(r"^  (--[a-z-]+)", page, re.M) for page in (printed(capsys, TrainConfig, "-h"), text))
    other = {"--config", "--print-config", "--json", "--version", "--help-all"}
    assert {*shown} - other == {f"--{name.replace('_', '-')}" for name in TrainConfig.everyday}
    assert {*everything} - other == {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields}
    assert "None" not in text
    for name, field in TrainConfig.model_fields.items():
        assert field.description
        assert field.default is not None or "[" in field.description, f"--{name} does not give its unset value"
    for heading, flag in {"Training data": "data", "Recipe and optimization": "seed", "Run folder": "resume"}.items():
        (section,) = [section for section in text.split("\n\n") if section.startswith(f"{heading}:\n")]
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
    text = printed(capsys, config_class, *flags, "--print-config")
    (tmp_path / "run.yaml").write_text(text)
    assert parse(config_class, ["--config", str(tmp_path / "run.yaml")], "") == parse(config_class, flags, "")
    assert max(map(len, text.splitlines())) <= 100
    for name, field in config_class.model_fields.items():
        assert f"\n{name}: " in f"\n{text}"
        assert (field.description or "").split()[0] in text


def test_a_printed_config_leaves_required_settings_open(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n# model:  (required)\n" in printed(capsys, ScoreConfig, "--print-config")
    assert "\n# number:  (required)" in printed(capsys, PredictConfig, "--print-config")


@pytest.mark.parametrize("config_class", [TrainConfig, ScoreConfig])
def test_help_of_a_config_in_python_begins_with_its_fields_and_their_meaning(config_class: type[JobConfig]) -> None:
    page = pydoc.plain(pydoc.render_doc(config_class))
    text = " ".join(page.replace("|", " ").split())
    for name, field in config_class.model_fields.items():
        assert f"{name}: {' '.join((field.description or '').split())}" in text
    assert len(page.partition("Fields:")[0]) < 1000, "the signature has names and defaults only"


def test_in_python_an_error_names_the_argument() -> None:
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match=r"epochs\s+Value error, must be no boolean"):
        TrainConfig(epochs=True)
