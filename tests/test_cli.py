"""The command `mnistsum`, without Ray: its commands, and how a job ends: signals, the last line and the exit code."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mnistsum_ray import __version__
from mnistsum_ray.cli import COMMANDS
from mnistsum_ray.config import TrainConfig
from mnistsum_ray.errors import percent
from tests.conftest import default_signals

ROOT = Path(__file__).parents[1]
MNISTSUM = Path(sys.executable).with_name("mnistsum")


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_it_names_its_commands_and_its_version() -> None:
    text = run(MNISTSUM).stdout
    assert all(command in text for command in COMMANDS)
    assert run(MNISTSUM, "--help").stdout == text
    assert run(MNISTSUM, "--version").stdout == run(MNISTSUM, "train", "--version").stdout == f"mnistsum_ray {__version__}\n"


def test_help_is_a_command_too() -> None:
    assert run(MNISTSUM, "help").stdout == run(MNISTSUM, "--help").stdout
    assert run(MNISTSUM, "help", "score").stdout == run(MNISTSUM, "score", "--help").stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("trian", "trian: there is no such command; did you mean train?"),
        ("play", "play: there is no such command; mnistsum --help lists them"),
        ("completion", "completion: for bash or zsh?"),
        ("train --epochz 5", "--epochz: there is no such flag; did you mean --epochs? (--help-all lists them)"),
        ("train --epochz=5", "--epochz: there is no such flag; did you mean --epochs? (--help-all lists them)"),
        ("train --recipe shrt", "--recipe: input should be 'quick', 'short' or 'long', got 'shrt'; did you mean short?"),
        ("train --data sampel", "--data sampel: there is no such file or folder (DIR/sampel); did you mean sample?"),
        (
            "score",
            "--model, --input, --output: are required, on the command line or in the config file (--help has examples)",
        ),
    ],
)
def test_a_mistake_is_one_line_with_a_hint(flags: str, message: str, tmp_path: Path) -> None:
    done = run(MNISTSUM, *flags.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message.replace('DIR', str(tmp_path))}\n"


@pytest.mark.parametrize("flags", ["-h", "train --help", "completion bash"])
def test_a_reader_may_close_the_pipe(flags: str) -> None:
    shell = f"set -o pipefail; {MNISTSUM} {flags} | true"
    done = subprocess.run(["bash", "-c", shell], env=os.environ | {"PYTHONUNBUFFERED": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flags", ["--version", "train --version", "train --help", "train --print-config"])
def test_a_full_disk_is_said(flags: str, unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", f"{MNISTSUM} {flags} > /dev/full"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written (No space left on device)\n"


_COMPLETE = """
eval "$({mnistsum} completion bash)"
COMP_WORDS=({words} ""); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); {more}
_shtab_mnistsum; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "last", "expected"),
    [
        ("mnistsum", "sc", {"score"}),
        ("mnistsum train", "--r", {"--recipe", "--resume"}),
        ("mnistsum train --recipe", "", {"quick", "short", "long"}),
        ("mnistsum score --use-gpu", "", {"true", "false"}),
        ("mnistsum score --model", f"{ROOT}/job", {f"{ROOT}/jobs"}),
    ],
)
def test_bash_completes_commands_flags_and_values(words: str, last: str, expected: set[str]) -> None:
    script = _COMPLETE.format(mnistsum=MNISTSUM, words=words, more=f'COMP_WORDS[COMP_CWORD]="{last}"')
    assert set(run("bash", "-c", script).stdout.split()) == expected


def test_the_script_for_zsh_is_one() -> None:
    assert run(MNISTSUM, "completion", "zsh").stdout.startswith("#compdef mnistsum")


def test_help_shows_the_flags_of_every_day_and_all_when_asked() -> None:
    shown, everything = (
        re.findall(r"^  (--[a-z-]+)", run(MNISTSUM, "train", flag).stdout, re.M) for flag in ("-h", "--help-all")
    )
    other = {"--config", "--print-config", "--json", "--version", "--help-all"}
    assert len({*shown} - other) == 10
    assert {*shown} < {*everything}
    assert {*everything} - other == {f"--{name.replace('_', '-')}" for name in TrainConfig.model_fields}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_job_and_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(MNISTSUM, command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    if command == "predict":  # no job of a cluster
        assert done.stdout.startswith("usage: mnistsum predict PICTURE [flags]\n")
        return
    job = run(sys.executable, ROOT / "jobs" / f"{command.replace('-', '_')}.py", "--help")
    assert job.stdout.partition("\n\n")[2] == done.stdout.partition("\n\n")[2]
    usages = [text.partition("\n")[0] for text in (done.stdout, job.stdout)]
    assert usages == [f"usage: mnistsum {command} [flags]", f"usage: python jobs/{command.replace('-', '_')}.py [flags]"]
    assert not [word for word in ("tuple[", "{int", "None") if word in done.stdout]


_IMPORTS = """
import sys
from mnistsum_ray.cli import main
try:
    main([sys.argv[1], "--help"])
finally:
    print([name for name in ("numpy", "pyarrow", "ray", "torch") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once_since_it_imports_nothing_large(command: str) -> None:
    assert run(sys.executable, "-c", _IMPORTS, command).stderr == "[]\n"


_PREDICT = """
import sys
from mnistsum_ray.cli import main
code = main(["predict", *sys.argv[1:]])
assert "ray" not in sys.modules
sys.exit(code)
"""


def test_one_picture_is_answered_in_words_and_as_json(model: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (300, 400), "white")
    ImageDraw.Draw(picture).line([(80, 60), (220, 50), (140, 340)], fill=(20, 40, 160), width=30, joint="curve")
    picture.save(tmp_path / "seven.jpg")
    done = run(sys.executable, "-c", _PREDICT, "seven.jpg", "--number", 5, "--model", model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert list(line) == ["picture", "number", "digit", "digit_prob", "sum", "sum_prob", "consistent", "prepared"]
    assert (line["picture"], line["number"]) == ("seven.jpg", 5)
    assert line["prepared"].startswith("300x400 colour, dark ink on light: inverted, cropped to ")
    how, answers = done.stderr.splitlines()
    assert how == f"seven.jpg: {line['prepared']}"
    assert answers.startswith(
        f"digit: {line['digit']} ({percent(line['digit_prob'])}), digit + 5: {line['sum']} ({percent(line['sum_prob'])})"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["blank.png", "--number", "5", "--model", "{model}"], "blank.png: nothing is drawn on it"),
        (["blank.png", "--number", "10", "--model", "{model}"], "--number: input should be less than or equal to 9"),
        (["nowhere.png", "--number", "5", "--model", "{model}"], "nowhere.png: there is no such file"),
        (["--number", "5", "--model", "{model}"], "PICTURE: is required"),
        (["seven.png", "--number", "5", "--model", "nowhere"], "nowhere/model: holds no model"),
    ],
)
def test_a_picture_that_cannot_be_answered_is_one_line(model: Path, tmp_path: Path, argv: list[str], said: str) -> None:
    Image.new("RGB", (300, 400), "white").save(tmp_path / "blank.png")
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(tmp_path / "seven.png")
    done = run(MNISTSUM, "predict", *(word.format(model=model) for word in argv), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


_JOB = """
import atexit, signal, sys, time
from contextlib import contextmanager
from mnistsum_ray import cli
from mnistsum_ray.errors import RunError, RunInterrupted

@contextmanager
def slow():
    try:
        yield
    finally:
        time.sleep({cleanup})

class Slow:
    def __del__(self):
        print("ready", file=sys.stderr, flush=True)
        time.sleep(2)

def work(argv):
    with slow():
        try:
            {first}
            print("ready", file=sys.stderr, flush=True)
            time.sleep({work})
        except KeyboardInterrupt:
            raise {ends}("what is saved stays") from None
    return {{"done": True}}, 0

atexit.register(time.sleep, 1)
sys.exit(cli.run(work, []))
"""


def start(
    work: float = 30,
    cleanup: float = 0,
    ends: str = "RunInterrupted",
    first: str = "",
    before: Callable[[], object] = default_signals,
) -> subprocess.Popen[str]:
    """Start a job that works for `work` seconds and cleans up for `cleanup` seconds, and wait until it works.

    Args:
        ends: the error that the job raises when it is stopped.
        first: a statement that the job runs first.
        before: runs in the child process before exec.
    """
    job = subprocess.Popen(
        [sys.executable, "-c", _JOB.format(work=work, cleanup=cleanup, ends=ends, first=first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    assert job.stderr is not None
    assert job.stderr.readline() == "ready\n"
    return job


def test_a_signal_that_is_ignored_stops_nothing() -> None:
    """`nohup` ignores SIGHUP. A shell that runs a script ignores SIGINT for what the script starts with `&`."""
    job = start(work=1.5, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    job.send_signal(signal.SIGHUP)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (0, '{"done": true}\n', "")


@pytest.mark.parametrize("pause", [pytest.param(0.3, marks=pytest.mark.slow), 3.0])
def test_an_impatient_second_signal_changes_neither_the_line_nor_the_exit_code(pause: float) -> None:
    job = start(cleanup=5)
    job.send_signal(signal.SIGINT)
    time.sleep(pause)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (130, "", "stopped by SIGINT; what is saved stays\n")


@pytest.mark.slow
def test_a_signal_that_comes_in_a_finalizer_stops_the_job_too() -> None:
    """Python prints an exception that is raised in a finalizer, and continues; the signal is sent again 5 s later."""
    job = start(first="Slow()")
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (143, "")
    assert "KeyboardInterrupt" in err
    assert err.endswith("\nstopped by SIGTERM; what is saved stays\n")


@pytest.mark.slow
def test_a_job_that_fails_while_it_is_stopped_says_why() -> None:
    job = start(cleanup=7, ends="RunError")  # the interrupt is raised a second time during the cleanup
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (1, "", "error: what is saved stays\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_result_changes_nothing(number: signal.Signals) -> None:
    job = start(work=0)
    assert job.stdout is not None
    assert job.stdout.readline() == '{"done": true}\n'
    job.send_signal(number)
    _, err = job.communicate(timeout=30)
    assert (job.returncode, err) == (0, "")


_PRINTING_JOB = """
import sys
from mnistsum_ray import cli

def work(argv):
    cli.reserve_stdout_for_result()
    print("progress")
    return {"done": True}, 0

stdout = sys.stdout
code = cli.run(work, [])
print("restored", sys.stdout is stdout, code)
"""


def test_only_the_result_is_printed_to_standard_output_which_a_caller_has_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PRINTING_JOB], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('{"done": true}\nrestored True 0\n', "progress\n")


@pytest.mark.parametrize(("flags", "printed"), [("[]", []), ('["--json"]', ['{"done": true}'])])
def test_a_terminal_gets_the_result_in_words_and_json_when_asked(flags: str, printed: list[str]) -> None:
    """The words are the job's own lines on standard error."""
    leader, follower = pty.openpty()
    job = f"import sys; from mnistsum_ray import cli; sys.exit(cli.run(lambda argv: ({{'done': True}}, 0), {flags}))"
    done = subprocess.run([sys.executable, "-c", job], stdout=follower, stderr=subprocess.PIPE, text=True, check=False)
    os.write(follower, b"end")  # so that there is something to read
    assert (done.returncode, done.stderr) == (0, "")
    shown = b""
    while not shown.endswith(b"end"):
        shown += os.read(leader, 1000)
    assert shown.decode().split("\r\n") == [*printed, "end"]
    os.close(leader)
    os.close(follower)
