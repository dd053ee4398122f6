"""The command `mnistsum`, without Ray: its commands, signals, the last line and the exit codes."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mnistsum_ray import __version__, cli
from mnistsum_ray.config import PredictConfig
from mnistsum_ray.errors import percent
from tests.conftest import default_signals

ROOT = Path(__file__).parents[1]
MNISTSUM = Path(sys.executable).with_name("mnistsum")
Captured = pytest.CaptureFixture[str]


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_it_names_its_commands_and_its_version(capsys: Captured) -> None:
    assert [cli.main([]), cli.main(["--help"]), cli.main(["--version"])] == [0, 0, 0]
    text = capsys.readouterr().out
    assert all(text.count(f"\n  {command} ") == 2 for command in cli.COMMANDS)
    assert text.endswith(f"mnistsum_ray {__version__}\n")


def test_a_mistake_is_one_line_with_a_hint(tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["trian"]) == 2
    hint = "there is no such command; did you mean train? (mnistsum --help lists them)"
    assert capsys.readouterr() == ("", f"error: trian: {hint}\n")
    done = run(MNISTSUM, "train", "--data", "sampel", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    found = f"there is no such file or folder ({tmp_path}/sampel); did you mean sample?"
    assert done.stderr == f"error: --data sampel: {found}\n"


def test_a_reader_may_close_the_pipe_and_a_full_disk_is_said() -> None:
    done = run("bash", "-c", f"set -o pipefail; {MNISTSUM} train --help | true")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("bash", "-c", f"(sleep 1; {MNISTSUM} trian; echo $?) 2> >(true)")
    assert (done.stdout, done.stderr) == ("2\n", "")
    done = run("bash", "-c", f"{MNISTSUM} train --help > /dev/full")
    message = "error: standard output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, message)


_HELP = """
import sys
from mnistsum_ray.cli import COMMANDS, main
for command in COMMANDS:
    assert main([command, "--help"]) == 0
assert main(["train", "--nonsense"]) == 2
print([name for name in ("numpy", "pyarrow", "ray", "torch") if name in sys.modules])
"""


def test_help_fits_a_terminal_and_imports_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(sys.executable, "-c", _HELP).stdout
    assert text.endswith("\n[]\n")
    lines = [line for line in text.splitlines() if not line.startswith("usage: ")]
    assert [line for line in lines if len(line) > 80] == []
    for command in cli.COMMANDS:
        assert f"usage: mnistsum {command} " in text
    job = run(sys.executable, ROOT / "jobs" / "export_pairs.py", "--help").stdout
    assert "\nusage: python jobs/export_pairs.py " in job


def test_one_picture_is_answered(model: Path, tmp_path: Path, capsys: Captured) -> None:
    """In words, and as JSON."""
    file = str(tmp_path / "one.png")
    picture = Image.new("L", (300, 400), 255)
    picture.paste(0, (140, 50, 160, 350))
    picture.save(file)
    answer = cli.predict(PredictConfig(picture=file, number=5, model=str(model)))
    line = json.loads(json.dumps(answer))
    names = "picture number digit digit_prob sum sum_prob consistent unsure"
    assert list(line) == names.split()
    assert (line["picture"], line["number"], line["unsure"]) == (file, 5, True)
    answers, unsure = capsys.readouterr().err.splitlines()
    digit, total = (f"{line[head]} ({percent(line[f'{head}_prob'])})" for head in ("digit", "sum"))
    assert answers == f"digit: {digit}, digit + 5: {total}"
    assert unsure == "unsure: the digit's probability is below 90 %", "the weights are random"


_JOB = """
import atexit, sys, time
from mnistsum_ray import cli
from mnistsum_ray.errors import RunInterrupted

def work():
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep({work})
    except KeyboardInterrupt:
        time.sleep({cleanup})
        raise RunInterrupted("what is saved stays") from None
    return {{"done": True}}

atexit.register(time.sleep, 1)
sys.exit(cli.run(work, True))
"""


def start(work: float = 30, cleanup: float = 0, ignored: int | None = None) -> Any:
    """Start a job that works and cleans up for so many seconds; its parent may ignore a signal."""

    def before() -> None:
        default_signals()
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    command = [sys.executable, "-c", _JOB.format(work=work, cleanup=cleanup)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, preexec_fn=before, **pipes)
    assert job.stderr.readline() == "ready\n"  # type: ignore[union-attr]
    return job


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
DONE = (0, '{"done": true}\n', "")


@pytest.mark.parametrize(
    ("settings", "signals", "pause", "expected"),
    [
        # `nohup` ignores SIGHUP, and a script's shell SIGINT for what it starts with `&`.
        ({"work": 0.5, "ignored": HUP}, [HUP], 0, DONE),
        ({}, [TERM], 0, (143, "", "stopped by SIGTERM; what is saved stays\n")),
        # `timeout` sends its signal twice; a later one ends the process at once.
        ({"cleanup": 1}, [INT, INT], 0.3, (130, "", "stopped by SIGINT; what is saved stays\n")),
        ({"cleanup": 60}, [INT, INT], 3.0, (130, "", "")),
    ],
)
def test_a_signal_stops_it(settings: Any, signals: list[int], pause: float, expected: Any) -> None:
    job = start(**settings)
    for number in signals:
        job.send_signal(number)
        time.sleep(pause)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == expected


def test_a_signal_after_the_result_changes_nothing() -> None:
    job = start(work=0)
    assert job.stdout.readline() == DONE[1]
    job.send_signal(TERM)
    assert job.communicate(timeout=30)[1] == ""
    assert job.returncode == 0


_PRINTING_JOB = """
import sys
from mnistsum_ray import cli

def work():
    print("progress")
    return {"done": True}

code = cli.run(work, "--json" in sys.argv or not sys.stdout.isatty())
print("restored", code)
"""


@pytest.mark.parametrize(("flags", "lines"), [([], []), (["--json"], ['{"done": true}'])])
def test_a_terminal_gets_json_when_asked(flags: list[str], lines: list[str]) -> None:
    """And else the result in words, which are the job's own lines on standard error."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", _PRINTING_JOB, *flags]
    done = subprocess.run(command, stdout=follower, stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == "progress\n"
    assert os.read(leader, 1000).decode().split("\r\n") == [*lines, "restored 0", ""]
    os.close(leader)
    os.close(follower)
