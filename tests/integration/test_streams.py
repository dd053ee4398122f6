"""A job whose standard streams are closed, by the shell or by their readers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

JOB = f"{sys.executable} {ROOT}/jobs/export_pairs.py --data sample --rows 10 --files 1 --output out"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$JOB >&-; echo $? > code", 0, "10 rows of sample in 1 file: "),
        ("$JOB >&- 2>&- <&-; echo $? > code", 0, ""),
        ("touch out; $JOB 2>&-; echo $? > code", 2, ""),
        ("(sleep 1; $JOB; echo $? > code) 2> >(true)", 0, ""),
        ("(sleep 1; $JOB; echo $? > code) | true", 1, "error: standard output was closed by its reader, so the result could not"),
    ],
)
def test_closed_streams(tmp_path: Path, line: str, code: int, said: str) -> None:
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"JOB": JOB})
    assert (tmp_path / "code").read_text() == f"{code}\n", done.stderr
    *_, last = done.stderr.splitlines() or [""]
    assert last.startswith(said) if said else done.stderr == ""
    assert bool(list(tmp_path.glob("out/*.parquet"))) == (code != 2)
