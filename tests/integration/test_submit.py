"""`ray start --head` and `ray job submit` on one machine, as in the README, with token authentication."""

import json
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import RAY, ROOT, Head

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(head: Head) -> Path:
    """A copy of the project with another version, which a run's manifest shows if this copy has run."""
    copy = head.folder / "project"
    kept = [name for name in ("jobs", "mnistsum_ray", "pyproject.toml") if (ROOT / name).exists()]
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name)
        else:
            shutil.copy(ROOT / name, copy / name)
    package = copy / "mnistsum_ray" / "__init__.py"
    package.write_text(package.read_text() + '\n__version__ = "9.9.9"\n')
    return copy


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the job's JSON line from the log that `ray job submit` shows."""
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    value: dict[str, Any] = json.loads(line)
    return value


def test_a_client_without_the_token_is_rejected(head: Head) -> None:
    without = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_MODE"} | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([RAY, "job", "list"], env=without, capture_output=True, text=True)
    assert done.returncode
    assert "nauth" in done.stdout + done.stderr


def test_both_jobs_from_a_working_dir(head: Head, project: Path) -> None:
    rows, output = head.folder / "rows.parquet", head.folder / "predictions"
    pq.write_table(pq.read_table(SAMPLE)[::10], rows)
    train = ["python", "jobs/train.py", "--data", str(rows), "--epochs", "1", "--sum-head-steps", "50", "--name", "mine"]
    done, code = head.submit(*train, working_dir=project)
    assert (done.returncode, code) == (0, 0), done.stdout
    run = Path(last_line(done)["run"])
    assert run == head.folder / "runs" / "mine", "a relative path of a submitted job starts from home"
    assert json.loads((run / "manifest.json").read_text())["versions"]["mnistsum_ray"] == "9.9.9"

    # Each exit code: 0 done, 2 the request is wrong, 3 some input was set aside, 1 failed.
    done, code = head.submit(*train, working_dir=project)
    assert (done.returncode, code) == (1, 2), done.stdout
    assert "error: --name mine:" in done.stdout
    export_pairs(ExportPairsConfig(data="sample", output=str(head.folder / "pairs"), rows=500, files=2), print)
    (head.folder / "pairs" / "bad.parquet").write_bytes(b"no")
    score = ["python", "jobs/score.py", "--model", "runs/mine", "--input", "pairs", "--output", str(output)]
    done, code = head.submit(*score, working_dir=project)
    assert (done.returncode, code) == (1, 3), done.stdout
    assert (last_line(done)["scored_rows"], last_line(done)["failed_files"]) == (500, 1)
    done, code = head.submit(*score, "--strict", "--overwrite", working_dir=project)
    assert (done.returncode, code) == (1, 1), done.stdout
    assert "error: --strict: nothing was scored" in done.stdout


def test_a_stopped_job_says_how_to_resume(head: Head, project: Path) -> None:
    job = f"job-{secrets.token_hex(4)}"
    train = ["python", "jobs/train.py", "--data", "sample", "--epochs", "50", "--name", "stopped"]
    where = ["--submission-id", job, "--no-wait", "--working-dir", str(project)]
    submitted = subprocess.run([RAY, "job", "submit", *where, "--", *train], env=head.environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def ray_job(*words: str) -> str:
        return subprocess.run([RAY, "job", *words, job], env=head.environment, check=True, capture_output=True, text=True).stdout

    deadline = time.monotonic() + 180
    while "epoch 1: train loss" not in ray_job("logs"):
        assert time.monotonic() < deadline
        time.sleep(1)
    ray_job("stop")
    log = ray_job("logs")
    storage = head.folder / "runs"
    command = f"python jobs/train.py --storage-path {storage} --name stopped --resume"
    assert f"stopped by SIGTERM; checkpoints are kept, and this command resumes: {command}" in log
    assert "Traceback" not in log
    assert json.loads((storage / "stopped" / "manifest.json").read_text())["status"] == "stopped"
