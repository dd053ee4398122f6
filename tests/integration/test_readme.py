"""The README's commands do what it says; `ray job submit` with the token of a head on this machine."""

import json
import os
import re
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.integration.conftest import RAY, ROOT, kill_everything, run_warm

pytestmark = pytest.mark.slow


def commands_of(section: str) -> list[list[str]]:
    """The jobs in the first shell block of a section, as words of `mnistsum`."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}")[2]
    block = text.partition("```bash\n")[2].partition("```")[0]
    found = re.findall(r"^python jobs/(\w+)\.py(.*)$", block, re.MULTILINE)
    return [[job.replace("_", "-"), *shlex.split(flags.partition(" > ")[0])] for job, flags in found]


@pytest.mark.timeout(900)
def test_the_jobs_of_all_sections_but_the_clusters(cluster: str, tmp_path: Path) -> None:
    """As a reader does who begins at the top, with a small MNIST in ./data and ~/mnist. Python: test_process_state."""
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
                command += ["--epochs", "1", "--sum-head-steps", "5"]  # the first shows what is learned
            ((code, text),) = run_warm([command], tmp_path, HOME=str(tmp_path), RAY_ADDRESS=cluster)
            assert code == 0, (command, text[-2000:])
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/manifest.json")}
    assert {run["status"] for run in runs.values()} == {"finished"}
    assert {run["config"]["recipe"] for run in runs.values()} == {"short", "long"}
    learned = runs["mine"]["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.98, "of the bundled sample"
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 100_000
    assert (tmp_path / "test-scored" / "report.html").exists()
    scored = json.loads((tmp_path / "scored" / "manifest.json").read_text())["totals"]
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
        image_header, label_header = struct.pack(">4I", 0x803, count, 28, 28), struct.pack(">2I", 0x801, count)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(image_header + images[part].tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(label_header + digits[part].tobytes())


@dataclass
class Head:
    """A head started by `ray start`."""

    folder: Path
    """Home folder, and the folder where the head was started."""
    environment: dict[str, str]
    """Environment of a client, with the address and the token mode."""

    def ray(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `ray job WORDS` as a client."""
        command = [str(RAY), "job", *words]
        return subprocess.run(command, env=self.environment, check=check, capture_output=True, text=True, timeout=240)


@contextmanager
def started_head(folder: Path) -> Iterator[Head]:
    """Start a head on free ports, in a home folder with a token."""
    here = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    here |= {"HOME": str(folder), "RAY_TMPDIR": str(folder), "PATH": f"{RAY.parent}:{here['PATH']}"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=here, check=True, capture_output=True)
    with socket.socket() as dashboard, socket.socket() as agent:
        for probe in (dashboard, agent):
            probe.bind(("127.0.0.1", 0))
        port, agent_port = (probe.getsockname()[1] for probe in (dashboard, agent))
    # The agent starts submitted jobs. That of another cluster on this machine may have its usual port.
    ports = ["--port=0", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"]
    command: list[Path | str] = [RAY, "start", "--head", "--block", *ports, "--num-cpus=2"]
    process = subprocess.Popen(command, env=here, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = here | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
        deadline = time.monotonic() + 120
        # The dashboard lists jobs before the agent that starts them is ready.
        while subprocess.run([RAY, "job", "submit", "--no-wait", "--", "true"], env=client, capture_output=True).returncode:
            assert time.monotonic() < deadline
            assert process.poll() is None
        yield Head(folder, client)
    finally:
        kill_everything(process.pid)
        process.wait(timeout=30)


def test_submitted_jobs(model: Path) -> None:
    """From a working directory. A job that is stopped says how to resume, and ends with one of our exit codes."""
    with tempfile.TemporaryDirectory(prefix="h") as name, started_head(Path(name)) as head:
        project, runs = head.folder / "project", head.folder / "runs"
        for part in ("jobs", "mnistsum_ray"):
            shutil.copytree(ROOT / part, project / part)
        with (project / "mnistsum_ray" / "__init__.py").open("a") as package:
            package.write('\n__version__ = "9.9.9"\n')  # the manifest shows it if this copy has run
        write_small_mnist(head.folder / "small")
        job = f"job-{secrets.token_hex(4)}"
        train = ["python", "jobs/train.py", "--data", "small", "--epochs", "500", "--name", "stopped"]
        head.ray("submit", "--submission-id", job, "--no-wait", "--working-dir", str(project), "--", *train)
        deadline = time.monotonic() + 180
        while not (runs / "stopped" / "history.jsonl").exists():  # relative paths begin at home
            assert time.monotonic() < deadline
            time.sleep(0.2)
        head.ray("stop", job)
        log = head.ray("logs", job).stdout
        command = f"python jobs/train.py --storage-path {runs} --name stopped --resume"
        assert f"stopped by SIGTERM; checkpoints are kept, and this command resumes: {command}" in log
        assert "Traceback" not in log
        manifest = json.loads((runs / "stopped" / "manifest.json").read_text())
        assert (manifest["status"], manifest["versions"]["mnistsum_ray"]) == ("stopped", "9.9.9")

        export_pairs(ExportPairsConfig(data="sample", output=str(head.folder / "in"), rows=500, files=2), print)
        (head.folder / "in" / "bad.parquet").write_bytes(b"no")
        score = ["python", "jobs/score.py", "--model", str(model), "--input", "in", "--output", "predictions"]
        done = head.ray("submit", "--working-dir", str(project), "--", *score)
        line = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
        assert (line["scored_rows"], line["failed_files"]) == (500, 1)
        assert (head.folder / "predictions" / "manifest.json").exists()
