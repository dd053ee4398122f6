"""The command `mnistsum`, without Ray: flags, config files, signals, last line and exit codes."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray import __version__, cli
from mnistsum_ray.cli import config_from_args
from mnistsum_ray.config import JobConfig, ScoreConfig, TaskConfig, TrainConfig
from mnistsum_ray.errors import RequestError
from mnistsum_ray.mnist.picture import PredictConfig
from tests.jobs import ROOT, default_signals

MNISTSUM = Path(sys.executable).with_name("mnistsum")
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def run_command(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, timeout=60, **PIPES)


_FAIL = """
from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError, RunError, TryAgainError

def fail():
    raise error

for error in (RequestError("a"), RunError("b"), TryAgainError("c")):
    print(cli.run(fail, show_json=True))
"""


def test_a_mistake_is_no_traceback(tmp_path: Path) -> None:
    for words, said in (
        ("trian", "error: command: invalid choice: 'trian' .*\n"),
        ("train --config no.yaml", r"error: --config \S+/no.yaml: does not exist\n"),
    ):
        done = run_command(MNISTSUM, *words.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(said, done.stderr)


def test_each_error_is_one_line_and_has_its_exit_code() -> None:
    done = run_command(sys.executable, "-c", _FAIL)
    assert (done.stdout, done.stderr) == ("2\n1\n75\n", "error: a\nerror: b\nerror: c\n")


_HELP = """
import sys
from contextlib import suppress
from mnistsum_ray.cli import COMMANDS, main
for words in (["--version"], [], *([command, "--help"] for command in COMMANDS)):
    with suppress(SystemExit):
        main(words)
assert main(["train", "--nonsense"]) == 2
print([name for name in ("ray", "torch", "torchvision", "matplotlib") if name in sys.modules])
"""


def test_help_fits_a_terminal_and_imports_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run_command(sys.executable, "-c", _HELP).stdout
    assert text.startswith(f"mnistsum_ray {__version__}\n")
    assert text.endswith("\n[]\n")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert not re.search(r"\[(None|True|False)\]", text), "as in Python, and not as in a flag"
    for command in cli.COMMANDS:
        assert f"\n  {command} " in text
        assert f"usage: mnistsum {command} " in text
    for shown in ("--resume [auto] ", "--precision bf16|fp32\n", "--json "):
        assert shown in text
    groups = ["most used", "the data", "the job", "the machine", "the task's own", "other"]
    of_train = text.partition("usage: mnistsum train ")[2]
    places = [of_train.index(f"\n{group}:\n") for group in groups]
    assert places == sorted(places)
    job = run_command(sys.executable, ROOT / "jobs" / "export_pairs.py", "--help").stdout
    assert job.startswith("usage: python jobs/export_pairs.py ")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_flag_has_fifteen_words_at_most(command: str) -> None:
    kind = cli.COMMANDS[command][1]
    if issubclass(kind, TaskConfig):
        kind = kind.of_task(None)
    for name, field in kind.model_fields.items():
        assert 1 < len((field.description or "").split()) <= 15, name


_JOB = """
import atexit, sys, time
from mnistsum_ray import cli
from mnistsum_ray.errors import RunInterrupted

def work():
    try:
        print("ready", flush=True)
        time.sleep({work})
    except KeyboardInterrupt:
        print("stopping", flush=True)
        time.sleep({cleanup})
        raise RunInterrupted("what is saved stays") from None
    return {{"done": True}}

atexit.register(time.sleep, {end})
sys.exit(cli.run(work, show_json=True))
"""


def start(ignored: int | None = None, **seconds: float) -> Any:
    """Start a job that works, cleans up, ends for so long; its parent may ignore a signal."""

    def before() -> None:
        default_signals()
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    code = _JOB.format(**{"work": 30, "cleanup": 0, "end": 0} | seconds)
    job: Any = subprocess.Popen([sys.executable, "-c", code], preexec_fn=before, **PIPES)
    assert job.stderr.readline() == "ready\n"
    return job


def end(job: Any) -> tuple[int, str, str]:
    """Exit code and output; `communicate` would lose what `readline` has read ahead."""
    out, err = job.stdout.read(), job.stderr.read()
    return job.wait(), out, err


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
DONE = '{"done": true}\n'


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_stops_a_job_which_says_how_to_resume(number: signal.Signals) -> None:
    job = start(cleanup=0.3)
    job.send_signal(number)
    assert job.stderr.readline() == "stopping\n"
    job.send_signal(number)  # as `timeout` does
    assert end(job) == (128 + number, "", f"stopped by {number.name}; what is saved stays\n")


def test_a_signal_after_the_result_or_one_that_the_parent_ignores_changes_nothing() -> None:
    """`nohup` ignores SIGHUP, and a script's shell SIGINT for what it starts with `&`."""
    job = start(work=0.3, ignored=HUP)
    job.send_signal(HUP)
    assert end(job) == (0, DONE, "")
    job = start(work=0, end=0.5)
    assert job.stdout.readline() == DONE
    job.send_signal(TERM)
    assert end(job) == (0, "", "")


def test_a_picture_is_answered_and_a_terminal_gets_json_when_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, shown = ROOT / "docs" / "pictures" / "seven.png", []

    def run(job: Any, show_json: bool) -> int:
        shown.append((show_json, job()))
        return 0

    monkeypatch.setattr(cli, "run", run)  # which would end the cluster of other tests
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for flags in ([], ["--json"]):
        cli.main(["predict", str(file), "--number=5", "--model", str(model), *flags])
    answers, unsure, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"digit: \d \([0-9.]+ %\), digit \+ 5: \d+ \([0-9.]+ %\)", answers)
    assert unsure == "unsure: the digit's probability is below 90 %", "the weights are random"
    (at_a_terminal, line), (when_asked, _) = shown
    assert (at_a_terminal, when_asked) == (False, True)
    names = "picture number digit digit_prob sum sum_prob consistent unsure"
    assert list(line) == names.split()
    assert (line["picture"], line["number"], line["unsure"]) == (str(file), 5, True)


FILE = "epochs: 3\nbatch-size: 128\nskip_bad_rows: yes\nname: 2024\ndropout: 1e-2"
OF_FILE = {"batch_size": 128, "name": "2024", "dropout": 0.01}
OF_BOTH = OF_FILE | {"epochs": 7, "skip_bad_rows": False}
INPUTS = {"input": ("a,b.parquet", "données/*.parquet", 'say "hi"', "[x]")}
AGAIN = "--input a,b.parquet données/*.parquet --strict false --input='say \"hi\"' --input=[x]"

RIGHT: list[tuple[type[JobConfig], str, str, dict[str, Any]]] = [
    (TrainConfig, "--num-workers 1,4 --precision=bf16", "", {"num_workers": (1, 4)}),
    (TrainConfig, "--resume --name None", "", {"resume": True, "name": "None"}),
    (TrainConfig, "--name a --resume auto", "", {"resume": "auto", "name": "a"}),
    (TrainConfig, "--skip-bad-rows false --epochs 7", FILE, OF_BOTH),
    (TrainConfig, "", "num-workers: [1, 2]\nprecision: null", {"num_workers": (1, 2)}),
    (ScoreConfig, "--input a,b.parquet données/*.parquet 'say \"hi\"' [x]", "", INPUTS),
    (ScoreConfig, AGAIN, "", INPUTS),
    (ScoreConfig, "", "input: pairs", {"input": ("pairs",)}),
]


@pytest.mark.parametrize(("kind", "flags", "file", "expected"), RIGHT)
def test_the_command_line_and_below_it_the_config_file_fill_the_config(
    tmp_path: Path, kind: type[JobConfig], flags: str, file: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text(file)
    words = ["--config", str(tmp_path / "run.yaml"), *shlex.split(flags)]
    if kind is ScoreConfig:
        words += ["--model", "m", "--output", "o"]
    made = config_from_args(kind, words)
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_config_file_that_is_a_pipe_is_read_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", f"echo epochs: 3 > {pipe}"]):
        assert config_from_args(TrainConfig, ["--config", str(pipe)]).epochs == 3
    said = f"--config {pipe}: is a pipe, which is read until its writer closes it\n"
    assert capsys.readouterr().err == said


PLACES = "--model=m --input=i --output=o"
WRONG: list[tuple[type[JobConfig], str, str, list[str]]] = [
    (TrainConfig, "--epohs=3", "", ["--epohs: unknown flag; did you mean --epochs?"]),
    (TrainConfig, "--epochs 0", "", ["--epochs: input should be greater than", ", got '0'"]),
    (TrainConfig, "--num-workers 4,2 --resume", "", ["--num-workers: must be N", "needs --name"]),
    (TrainConfig, "--num-workers a", "", ["--num-workers: input should be a valid", ", got 'a'"]),
    (TrainConfig, "--config no.yaml", "", ["no.yaml: does not exist"]),
    (TrainConfig, f"--data a {'x' * 5000}", "", ["xxx…"]),
    (PredictConfig, "--number 5 --model m", "", ["required: PICTURE"]),
    (ScoreConfig, "--batch-size 0", "", ["--model: req", "--input: req", "--output: req", "got"]),
    (TrainConfig, "", "epohs: 3", ["--epohs: there is no such setting; did you mean epochs?"]),
    (TrainConfig, "", "- epochs", ["is not YAML of `key: value` lines"]),
    (TrainConfig, "", "x: &x [1]\ny: [*x, *x]", ["has an alias (*NAME); write out what it"]),
    (TrainConfig, "", "epochs: true", ["--epochs: must be a number, not true"]),
    (TrainConfig, "", "data: null", ["input should be a valid string, got 'null'"]),
    (TrainConfig, "", f"name: {'x' * 5000}", ["--name: string should"]),
]


@pytest.mark.parametrize(("kind", "flags", "file", "said"), WRONG)
def test_all_that_is_wrong_is_said_in_one_short_line_by_flag_or_key(
    tmp_path: Path, kind: type[JobConfig], flags: str, file: str, said: list[str]
) -> None:
    (tmp_path / "run.yaml").write_text(file)
    with pytest.raises(RequestError) as error:
        config_from_args(kind, ["--config", str(tmp_path / "run.yaml"), *flags.split()])
    message = str(error.value)
    assert [text for text in said if text not in message] == []
    assert "\n" not in message
    assert len(message) < 700


def test_in_python_a_path_may_be_a_path_and_an_error_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    (entry,) = os.scandir(tmp_path)
    config = ScoreConfig(input=[Path("a"), "b"], model=entry, output="o")
    assert (config.input, config.model) == (("a", "b"), f"{tmp_path}/m")
    said = r"^--seed: input should be .*; --epohs: there is no such setting; did you mean epochs\?$"
    with pytest.raises(RequestError, match=said):
        TrainConfig(epohs=2, seed=-1)
