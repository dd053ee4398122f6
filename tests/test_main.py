"""The installed command `mnistsum`, and the files in jobs/, which are the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from mnistsum_ray import __version__
from mnistsum_ray.cli import COMMANDS

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


_HELP = """
import sys
from mnistsum_ray.cli import main
try:
    main([sys.argv[1], "--help"])
finally:
    print([name for name in ("numpy", "pyarrow", "ray", "torch") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "benchmark"])
def test_help_comes_at_once_since_it_imports_nothing_large(command: str) -> None:
    assert run(sys.executable, "-c", _HELP, command).stderr == "[]\n"


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    done = run(MNISTSUM, "score", "--modle", "m", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: unrecognized arguments: --modle m (--help lists the flags)"]
