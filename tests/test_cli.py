"""The command `mnistsum`, without Ray: its commands, and how a job ends: signals, the last line and the exit code."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnistsum_ray import __version__
from mnistsum_ray.cli import COMMANDS
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


def test_a_command_that_does_not_exist_is_an_error() -> None:
    done = run(MNISTSUM, "trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: trian: there is no such command")
    assert not done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_that_of_the_job_and_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = run(MNISTSUM, command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = run(sys.executable, ROOT / "jobs" / f"{command.replace('-', '_')}.py", "--help")
    assert job.stdout.partition("\n\n")[2] == done.stdout.partition("\n\n")[2]
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not [word for word in ("tuple[", "{int", "None") if word in done.stdout]


_IMPORTS = """
import sys
from mnistsum_ray.cli import main
try:
    main([sys.argv[1], "--help"])
finally:
    print([name for name in ("numpy", "pyarrow", "ray", "torch") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "benchmark"])
def test_help_comes_at_once_since_it_imports_nothing_large(command: str) -> None:
    assert run(sys.executable, "-c", _IMPORTS, command).stderr == "[]\n"


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    done = run(MNISTSUM, "score", "--modle", "m", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: unrecognized arguments: --modle m (--help lists the flags)"]


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


def test_a_signal_that_comes_in_a_finalizer_stops_the_job_too() -> None:
    """Python prints an exception that is raised in a finalizer, and continues."""
    job = start(first="Slow()")
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out) == (143, "")
    assert err in ("stopped by SIGTERM; what is saved stays\n", "ready\nstopped by SIGTERM; what is saved stays\n")


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
