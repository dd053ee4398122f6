"""The README's commands do what it says, as they stand there: those that this machine can run, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import ROOT

README = (ROOT / "README.md").read_text()


def block(section: str, language: str, beginning: str = "") -> str:
    """The first code block below a heading that begins so."""
    text = README[README.index(f"\n## {section}") :]
    found = re.search(rf"```{language}\n({re.escape(beginning)}.*?)```", text, re.DOTALL)
    assert found, section
    return found[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "mnistsum_ray"
    for name in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def run(command: list[str], cwd: Path) -> str:
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(cwd),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def laptop(copy: Path) -> Path:
    run(["bash", "-euc", block("Laptop", "bash")], copy)
    return copy


@pytest.mark.slow
def test_the_laptops_commands(laptop: Path) -> None:
    assert (laptop / "runs" / "mine" / "report.html").stat().st_size > 100_000
    assert sum(pq.read_metadata(file).num_rows for file in (laptop / "pairs").glob("*.parquet")) == 2000
    names = [{file.name for file in (laptop / folder).glob("part-*.parquet")} for folder in ("pairs", "scored/predictions")]
    assert names[0] == names[1]
    assert (laptop / "scored" / "probabilities.png").exists()


@pytest.mark.slow
def test_the_model_goes_elsewhere(laptop: Path) -> None:
    (command,) = re.findall(r"^(python jobs/export_model\.py .*)$", README, re.MULTILINE)
    run(["bash", "-euc", command], laptop)
    assert {file.name for file in (laptop / "exported").iterdir()} == {"model.pt2", "model.onnx"}


@pytest.mark.slow
@pytest.mark.sweep
def test_the_python(laptop: Path) -> None:
    printed = run([sys.executable, "-c", block("From Python", "python")], laptop)
    assert "pred_digit  pred_sum reason" in printed
    assert (laptop / "scored-again" / "manifest.json").exists()
