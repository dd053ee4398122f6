"""A job whose standard output or standard error is closed by its reader ends in order."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

JOB = f"{sys.executable} {ROOT}/jobs/export_pairs.py --data sample --rows 10 --files 1 --output out"


@pytest.mark.parametrize("closed", ["| true", "2> >(true)"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    command = ["bash", "-c", f"(sleep 1; {JOB}; echo $? > code) {closed}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "code").read_text() == "0\n", done.stderr
    assert "Traceback" not in done.stderr
