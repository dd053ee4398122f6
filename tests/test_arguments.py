"""Command lines and config files: what they set, and the one-line errors for what is invalid."""

import pydoc
import re
from pathlib import Path

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import JobConfig, PredictConfig, ScoreConfig, TrainConfig
from mnistsum_ray.errors import RequestError, TextAsked

SCORE = ["--input", "i", "--model", "m", "--output", "o"]
LONG = "x" * 5000


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, list(argv), "a description")


def printed(config_class: type[JobConfig], *argv: str) -> str:
    """What a command line prints that makes no config."""
    with pytest.raises(TextAsked) as asked:
        parse(config_class, list(argv), "")
    return str(asked.value)


def check_error(config_class: type[JobConfig], argv: list[str], message: str) -> None:
    """Assert that a command line is refused in one line, which does not quote all of a long value."""
    with pytest.raises(RequestError) as error:
        parse(config_class, argv, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_flags() -> None:
    made = config("--epochs", "3", "--use-gpu", "false", "--num-workers", "2,4", "--precision", "bf16", "--skip-bad-rows")
    assert (made.epochs, made.use_gpu, made.worker_range, made.precision) == (3, False, (2, 4), "bf16")
    undone = config("--skip-bad-rows", "--no-skip-bad-rows")
    assert (made.skip_bad_rows, config().skip_bad_rows, undone.skip_bad_rows) == (True, False, False)
    resumes = [config("--name", "a", *flags).resume for flags in ([], ["--resume"], ["--resume", "auto"], ["--resume", "false"])]
    assert resumes == [False, True, "auto", False]
    assert (config("--num-workers", "3").worker_range, config().worker_range) == ((3, 3), None)


def test_the_command_line_overrides_the_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nbatch-size: 128\nnum_workers: [1, 2]\nuse_gpu: false\nskip_bad_rows: true\n")
    made = config("--config", str(file), "--epochs", "7", "--no-skip-bad-rows")
    assert (made.epochs, made.batch_size, made.num_workers, made.use_gpu, made.skip_bad_rows) == (7, 128, (1, 2), False, False)


@pytest.mark.parametrize(
    ("config_class", "argv", "message"),
    [
        (TrainConfig, ["--epohs=3"], "--epohs: there is no such flag; did you mean --epochs? (--help-all lists them)"),
        (TrainConfig, ["--epoch", "3"], "--epoch: there is no such flag"),  # no guessing at abbreviations
        (TrainConfig, ["--epochs", "0"], "--epochs: input should be greater than or equal to 1, got '0'"),
        (TrainConfig, ["--recipe", "shrt"], "input should be 'quick', 'short' or 'long', got 'shrt'; did you mean short?"),
        (TrainConfig, ["--num-workers", "4,2"], "--num-workers: must be N >= 1, or MIN,MAX with 1 <= MIN <= MAX"),
        (TrainConfig, ["--num-workers", "a"], "--num-workers: must be N or MIN,MAX"),
        (TrainConfig, ["--learning-rate", "nan"], "--learning-rate"),
        (TrainConfig, ["--name", "a/b"], "--name"),
        (TrainConfig, ["--resume"], "--resume: needs --name, the run to continue"),
        (TrainConfig, ["--resume", "--name", "a", "--from-run", "b"], "--from-run: starts a new run, and --resume continues one"),
        (TrainConfig, ["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (TrainConfig, ["--seed"], "--seed"),
        (TrainConfig, ["--seed", "9" * 5000], "--seed"),
        (TrainConfig, ["--data", "a", LONG], "xxx…"),
        (PredictConfig, ["--number", "5", "--model", "m"], "PICTURE: is required"),
        (ScoreConfig, [], "--model, --input, --output: are required, on the command line or in the config file"),
        (ScoreConfig, [*SCORE[2:], "--input"], "--input: needs a value"),
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
        ("epochs: yes\n", "'epochs' of the config file: input should be a valid integer"),
        ("seed: 1:30\n", "'seed' of the config file: input should be a valid integer"),  # YAML 1.1 reads 90
        ("- epochs\n", "must hold `key: value` lines"),
        ("epochs: [\n", "is not YAML"),
        ("batch-size: 64\nbatch_size: 128\n", "the key 'batch_size' is there twice"),
        (f"seed: {'[' * 1000}", "is not YAML"),
        (f"name: {LONG}", "key 'name' of the config file"),
        ("name: caf\xe9", "is not YAML: unacceptable character #x00e9"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_so_is_one_that_names_the_key_of_the_config_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    check_error(TrainConfig, ["--config", str(tmp_path / "run.yaml")], message)


def test_what_yaml_1_1_reads_otherwise_than_it_looks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 010\nname: 2024-01-01\nprecision: null\nlearning_rate: 1e-2\nskip_bad_rows: yes\n")
    made = config("--config", str(tmp_path / "run.yaml"))
    assert (made.seed, made.name, made.precision, made.learning_rate, made.skip_bad_rows) == (10, "2024-01-01", None, 0.01, True)


def test_help_shows_the_flags_of_every_day_and_all_when_asked_in_groups() -> None:
    text = printed(TrainConfig, "--help-all")
    shown, everything = (re.findall(r"^  (--[a-z-]+)", page, re.M) for page in (printed(TrainConfig, "-h"), text))
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
    tmp_path: Path, config_class: type[JobConfig], flags: list[str]
) -> None:
    text = printed(config_class, *flags, "--print-config")
    (tmp_path / "run.yaml").write_text(text)
    assert parse(config_class, ["--config", str(tmp_path / "run.yaml")], "") == parse(config_class, flags, "")
    assert max(map(len, text.splitlines())) <= 100
    for name, field in config_class.model_fields.items():
        assert f"\n{name}: " in f"\n{text}"
        assert (field.description or "").split()[0] in text
    assert "\n# number:  (required)" in printed(PredictConfig, "--print-config"), "left open"


def test_help_of_a_config_in_python_begins_with_its_fields_and_their_meaning() -> None:
    page = pydoc.plain(pydoc.render_doc(TrainConfig))
    text = " ".join(page.replace("|", " ").split())
    for name, field in TrainConfig.model_fields.items():
        assert f"{name}: {' '.join((field.description or '').split())}" in text
    assert len(page.partition("Fields:")[0]) < 1000, "the signature has names and defaults only"


def test_in_python_an_error_names_the_argument() -> None:
    with pytest.raises(ValueError, match="`resume`: needs `name`, the run to continue"):
        TrainConfig(resume=True)
    with pytest.raises(ValueError, match=r"epochs\s+Value error, must be no boolean"):
        TrainConfig(epochs=True)
