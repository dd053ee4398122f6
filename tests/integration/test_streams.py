"""Jobs with closed standard streams."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import ROOT

JOB = [sys.executable, str(ROOT / "jobs" / "export_pairs.py"), "--data", "sample", "--rows", "10", "--files", "1"]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, env=os.environ | {"JOB": " ".join(JOB)})


def test_standard_output_closed_by_its_reader(tmp_path: Path) -> None:
    done = shell("(sleep 2; $JOB --output late; echo $? > code) | true", tmp_path)
    assert (tmp_path / "code").read_text() == "1\n"
    assert done.stderr.endswith("\nerror: standard output was closed by its reader, so the result could not be printed\n")
    assert list((tmp_path / "late").glob("*.parquet"))


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    done = shell(f"$JOB --output out {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert pq.read_metadata(tmp_path / "out" / "part-00000.parquet").num_rows == 10
    assert done.stderr == ("" if "2>&-" in closed else f"10 rows of sample in 1 file: {tmp_path}/out\n")


def test_a_refusal_without_standard_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert shell("$JOB --output . 2>&-", tmp_path).returncode == 2


def test_standard_error_closed_by_its_reader(tmp_path: Path) -> None:
    done = shell("(sleep 1; $JOB --output out; echo $? > code) 2> >(true)", tmp_path)
    assert (tmp_path / "code").read_text() == "0\n", done
