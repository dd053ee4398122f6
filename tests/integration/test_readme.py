"""The README's commands do what it says, as they stand there: those that this machine can run, in a copy of the project."""

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.data.sources import SAMPLE
from tests.integration.conftest import ROOT, Head

README = (ROOT / "README.md").read_text()


def block(section: str, language: str, beginning: str = "") -> str:
    """The first code block below a heading that begins so."""
    text = README[README.index(f"\n## {section}") :]
    found = re.search(rf"```{language}\n({re.escape(beginning)}.*?)```", text, re.DOTALL)
    assert found, section
    return found[1]


@pytest.mark.slow
def test_all_sections_but_the_clusters_in_one_folder(head: Head) -> None:
    """As a reader does who begins at the top, with a small MNIST in ./data. `ray start` and `ray stop` act on the whole machine:
    a head on free ports stands in for them."""
    for name in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / name, head.folder / name)
    write_small_mnist(head.folder / "data")
    write_small_mnist(head.folder / "mnist")
    environment = {key: value for key, value in head.environment.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_API_SERVER_ADDRESS": head.environment["RAY_ADDRESS"], "PYTHONPATH": str(head.folder)}
    for section in ("Laptop", "One GPU box", "Train", "Score"):
        lines = [line for line in block(section, "bash").splitlines() if not re.match("ray (start|stop)", line)]
        for line in lines:
            if "days/" in line:
                shutil.copytree(head.folder / "test-pairs", head.folder / "days" / "1")
                shutil.copy(next((head.folder / "pairs").glob("*.parquet")), head.folder / "late.parquet")
            done = subprocess.run(line, shell=True, cwd=head.folder, env=environment, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, (line, done.stderr[-2000:])
    runs = [json.loads(path.read_text()) for path in (head.folder / "runs").glob("*/manifest.json")]
    assert [run["status"] for run in runs] == ["finished"] * 5
    assert sorted(run["config"]["recipe"] for run in runs) == ["long", *["short"] * 4]
    assert (head.folder / "runs" / "mine" / "report.html").stat().st_size > 100_000
    assert (head.folder / "test-scored" / "report.html").exists()
    names = [{file.name for file in (head.folder / where).glob("part-*.parquet")} for where in ("pairs", "scored/predictions")]
    assert names[0] <= names[1]
    scored = json.loads((head.folder / "scored" / "manifest.json").read_text())
    assert (scored["totals"]["scored_rows"], scored["totals"]["failed_files"]) == (10_250, 0)
    code = ["python", "-c", block("From Python", "python")]
    printed = subprocess.run(code, cwd=head.folder, env=environment, check=True, timeout=400, capture_output=True, text=True)
    assert "pred_digit  pred_sum reason" in printed.stdout
    assert {file.name for file in (head.folder / "exported").iterdir()} == {"model.pt2", "model.onnx"}
    assert (head.folder / "scored-again" / "manifest.json").exists()


def write_small_mnist(folder: Path) -> None:
    """IDX files of 313 training and 50 test rows of the sample."""
    folder.mkdir()
    rows = pq.read_table(SAMPLE)
    images = np.frombuffer(b"".join(rows["image"].to_pylist()), np.uint8).reshape(-1, 28, 28)
    digits = rows["digit"].to_numpy().astype(np.uint8)
    for name, part in (("train", slice(0, None, 16)), ("t10k", slice(8, None, 100))):
        header = struct.pack(">4I", 0x803, len(digits[part]), 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images[part].tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(digits[part])) + digits[part].tobytes())
