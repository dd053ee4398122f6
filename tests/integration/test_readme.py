"""The README's commands do what it says. `ray job submit`: test_connect."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import ROOT, run_warm

pytestmark = pytest.mark.slow


def commands_of(section: str) -> list[list[str]]:
    """The jobs in the first shell block of a section, as words of `mnistsum`."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}")[2]
    block = text.partition("```bash\n")[2].partition("```")[0]
    found = re.findall(r"^python jobs/(\w+)\.py(.*)$", block, re.MULTILINE)
    return [
        [job.replace("_", "-"), *shlex.split(flags.partition(" > ")[0])] for job, flags in found
    ]


@pytest.mark.timeout(900)
def test_the_jobs_of_all_sections_but_the_clusters(cluster: str, tmp_path: Path) -> None:
    """As a reader does who begins at the top, with a small MNIST in ./data and ~/mnist."""
    write_small_mnist(tmp_path / "data")
    write_small_mnist(tmp_path / "mnist")
    for section in ("Laptop", "One GPU box", "Train", "Score"):
        commands = commands_of(section)
        assert commands, section
        for command in commands:
            if any("days/" in word for word in command):
                shutil.copytree(tmp_path / "test-pairs", tmp_path / "days" / "1")
                shutil.copy(next((tmp_path / "pairs").glob("*.parquet")), tmp_path / "late.parquet")
            first = not (tmp_path / "runs").exists()
            if command[0] == "train" and not first and not {"--help", "--resume"} & {*command}:
                command += [
                    "--epochs",
                    "1",
                    "--sum-head-steps",
                    "5",
                ]  # the first shows what is learned
            command = [word.replace("~", str(tmp_path)) for word in command]
            ((code, text),) = run_warm([command], tmp_path, RAY_ADDRESS=cluster)
            assert code == 0, (command, text[-2000:])
    runs = {
        path.parent.name: json.loads(path.read_text())
        for path in tmp_path.glob("runs/*/manifest.json")
    }
    assert {run["status"] for run in runs.values()} == {"finished"}
    assert {run["config"]["recipe"] for run in runs.values()} == {"short", "long"}
    learned = runs["mine"]["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.98, "of the bundled sample"
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 100_000
    assert (tmp_path / "test-scored" / "report.html").exists()
    scored = json.loads((tmp_path / "days-scored" / "manifest.json").read_text())["totals"]
    assert (scored["scored_rows"], scored["failed_files"]) == (10_250, 0)
    assert (tmp_path / "exported" / "model.onnx").exists()


def write_small_mnist(folder: Path) -> None:
    """IDX files of 313 training and 50 test rows of the sample."""
    folder.mkdir()
    rows = pq.read_table(SAMPLE)
    images = np.frombuffer(b"".join(rows["image"].to_pylist()), np.uint8).reshape(-1, 28, 28)
    digits = rows["digit"].to_numpy().astype(np.uint8)
    for name, part in (("train", slice(0, None, 16)), ("t10k", slice(8, None, 100))):
        count = len(digits[part])
        image_header, label_header = (
            struct.pack(">4I", 0x803, count, 28, 28),
            struct.pack(">2I", 0x801, count),
        )
        (folder / f"{name}-images-idx3-ubyte").write_bytes(image_header + images[part].tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(label_header + digits[part].tobytes())


def test_the_example_in_python(
    cluster: str, tmp_path: Path, write_rows: Callable[[int], Path]
) -> None:
    text = (ROOT / "README.md").read_text().partition("## From Python")[2]
    written, smaller = (
        'data="sample", epochs=2)',
        f'data="{write_rows(500)}", epochs=1, sum_head_steps=5)',
    )
    code = text.partition("```python\n")[2].partition("```")[0].replace(written, smaller)
    assert smaller in code
    export_pairs(
        ExportPairsConfig(data="sample", output=str(tmp_path / "pairs"), rows=100, files=1), print
    )
    environment = os.environ | {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pred_sum" in done.stdout
    assert (tmp_path / "scored-again" / "manifest.json").exists()
