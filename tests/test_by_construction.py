"""Each promise is kept in one place, and a linter refuses what would go around it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnistsum_ray"
BANS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]


def lines_with(pattern: str) -> set[str]:
    """Modules of the package with a line that matches, relative to the package."""
    return {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if re.search(pattern, path.read_text())}


@pytest.mark.parametrize("module", ["scoring/output.py", "data/parquet.py", "storage/paths.py", "cluster/ray_internals.py"])
def test_a_line_that_goes_around_the_one_place_fails_the_linter(module: str) -> None:
    """Also in the modules that may do it: their own lines say so one by one."""
    lines = [f"import {name}; {name}" for name in sorted(BANS)]
    text = (PACKAGE / module).read_text()
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise", "-"]
    command += ["--stdin-filename", f"mnistsum_ray/{module}"]
    done = subprocess.run(command, input=text + "\n".join(lines), capture_output=True, text=True, cwd=ROOT)
    refused = {int(line.split(":")[1]) - text.count("\n") for line in done.stdout.splitlines() if "TID251" in line}
    assert refused == set(range(1, len(lines) + 1)), done.stdout


def test_the_text_of_a_uri_with_its_keys_is_read_where_it_is_resolved_alone() -> None:
    assert lines_with(r"\.reveal\(|\._text\b") == {"storage/paths.py", "storage/uri.py"}


def test_what_may_be_written_to_is_made_by_the_lock_alone() -> None:
    assert lines_with(r"\bOutputFolder\(|\bFolderLock\(") == {"storage/folder.py", "storage/lock.py"}


def test_files_are_written_where_it_is_known() -> None:
    """Beside the storage: a cache in the home folder, temporary folders of this process, and the files of Ray's own session."""
    writes = r"\.(write_bytes|write_text|unlink|rename|rmdir|touch|symlink_to)\(|rmtree\(|delete_dir\(|open_output_stream\("
    expected = {"data/idx.py", "reporting/mlflow.py", "training/checkpoint.py", "cluster/connection.py"}
    assert lines_with(writes) == expected | {"storage/lock.py", "storage/folder.py"}


def test_the_network_is_made_where_its_class_is_chosen() -> None:
    assert lines_with(r"TwoHeadCNN\(\)|globals\(\)") == {"model/network.py"}
