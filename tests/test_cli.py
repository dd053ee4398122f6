"""The command `mnistsum`, without Ray: its commands, signals, the last line and the exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mnistsum_ray import __version__, cli
from tests.jobs import ROOT, default_signals

MNISTSUM = Path(sys.executable).with_name("mnistsum")
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def run_command(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, timeout=60, **PIPES)


def test_a_mistake_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    done = run_command(MNISTSUM, "trian")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: command: invalid choice: 'trian' (choose from ")
    done = run_command(MNISTSUM, "train", "--data", "sampel", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    found = f"there is no such file or folder ({tmp_path}/sampel)"
    assert done.stderr == f"error: --data sampel: {found}\n"


_FAIL = """
from mnistsum_ray import cli
from mnistsum_ray.errors import RequestError, RunError, TryAgainError

def fail():
    raise error

for error in (RequestError("a"), RunError("b"), TryAgainError("c")):
    print(cli.run(fail, show_json=True))
"""


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
print([name for name in ("numpy", "pyarrow", "ray", "torch") if name in sys.modules])
"""


def test_help_fits_a_terminal_and_imports_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run_command(sys.executable, "-c", _HELP).stdout
    assert text.startswith(f"mnistsum_ray {__version__}\n")
    assert text.endswith("\n[]\n")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for command in cli.COMMANDS:
        assert f"\n  {command} " in text
        assert f"usage: mnistsum {command} " in text
    job = run_command(sys.executable, ROOT / "jobs" / "export_pairs.py", "--help").stdout
    assert job.startswith("usage: python jobs/export_pairs.py ")


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

atexit.register(time.sleep, 1)
sys.exit(cli.run(work, show_json=True))
"""


def start(work: float = 30, cleanup: float = 0, ignored: int | None = None) -> Any:
    """Start a job that works and cleans up for so many seconds; its parent may ignore a signal."""

    def before() -> None:
        default_signals()
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    command = [sys.executable, "-c", _JOB.format(work=work, cleanup=cleanup)]
    job: Any = subprocess.Popen(command, preexec_fn=before, **PIPES)
    assert job.stderr.readline() == "ready\n"
    return job


def end(job: Any) -> tuple[int, str, str]:
    """Exit code and output; `communicate` would lose what `readline` has read ahead."""
    out, err = job.stdout.read(), job.stderr.read()
    return job.wait(), out, err


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
DONE = (0, '{"done": true}\n', "")


@pytest.mark.parametrize(
    ("number", "cleanup", "again_after", "expected"),
    [
        (TERM, 0, None, (143, "", "stopped by SIGTERM; what is saved stays\n")),
        # `timeout` sends its signal twice; a later one ends the process at once.
        (HUP, 1, 0, (129, "", "stopped by SIGHUP; what is saved stays\n")),
        (INT, 60, 1.5, (130, "", "")),
    ],
)
def test_a_signal_stops_a_job_and_another_its_cleanup(
    number: int, cleanup: float, again_after: float | None, expected: Any
) -> None:
    job = start(cleanup=cleanup)
    job.send_signal(number)
    assert job.stderr.readline() == "stopping\n"
    if again_after is not None:
        time.sleep(again_after)
        job.send_signal(number)
    assert end(job) == expected


def test_a_signal_that_the_parent_ignores_changes_nothing() -> None:
    """`nohup` ignores SIGHUP, and a script's shell SIGINT for what it starts with `&`."""
    job = start(work=0.5, ignored=HUP)
    job.send_signal(HUP)
    assert end(job) == DONE


def test_a_signal_after_the_result_changes_nothing() -> None:
    job = start(work=0)
    assert job.stdout.readline() == DONE[1]
    job.send_signal(TERM)
    assert end(job) == (0, "", "")


def test_a_result_that_nobody_gets_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", _JOB.format(work=0, cleanup=0)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = "ready\nerror: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_picture_is_answered_and_a_terminal_gets_json_when_asked(
    flags: list[str], model: Path, tmp_path: Path
) -> None:
    """The result in words is on standard error."""
    file = str(tmp_path / "one.png")
    picture = Image.new("L", (300, 400), 255)
    picture.paste(0, (140, 50, 160, 350))
    picture.save(file)
    leader, follower = pty.openpty()
    command = [str(MNISTSUM), "predict", file, "--number", "5", "--model", str(model), *flags]
    done = subprocess.run(command, stdout=follower, stderr=subprocess.PIPE, text=True)
    os.write(follower, b"end")
    shown = ""
    while not shown.endswith("end"):
        shown += os.read(leader, 1000).decode()
    os.close(leader)
    os.close(follower)
    answers, unsure = done.stderr.splitlines()
    assert re.fullmatch(r"digit: \d \([0-9.]+ %\), digit \+ 5: \d+ \([0-9.]+ %\)", answers)
    assert unsure == "unsure: the digit's probability is below 90 %", "the weights are random"
    if flags:
        line = json.loads(shown.removesuffix("end"))
        names = "picture number digit digit_prob sum sum_prob consistent unsure"
        assert list(line) == names.split()
        assert (line["picture"], line["number"], line["unsure"]) == (file, 5, True)
    else:
        assert shown == "end"
