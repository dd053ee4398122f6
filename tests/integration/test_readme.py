"""The README's commands do what it says, in a copy of the project; `ray job submit` with the token of a head on this machine."""

import json
import os
import re
import secrets
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
from urllib.request import Request, urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest

from mnistsum_ray import load_model, predict
from mnistsum_ray.config import ExportPairsConfig
from mnistsum_ray.data.images import one_chunk, pixels_view
from mnistsum_ray.data.sources import SAMPLE
from mnistsum_ray.export.pairs import export_pairs
from tests.data.test_picture import FORMS
from tests.integration.conftest import RAY, ROOT, kill_everything

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()


@dataclass
class Head:
    """A head started by `ray start`."""

    folder: Path
    """Home folder, and the folder where the head was started."""
    environment: dict[str, str]
    """Environment of a client, with the address and the token mode."""

    def submit(self, *command: str, working_dir: Path) -> tuple[subprocess.CompletedProcess[str], int]:
        """Run `ray job submit`; return its result and the exit code of the job itself."""
        job = f"job-{secrets.token_hex(4)}"
        where = ["--submission-id", job, "--working-dir", str(working_dir)]
        done = self.ray("submit", *where, "--", *command, check=False)
        token = (self.folder / ".ray" / "auth_token").read_text().strip()
        request = Request(f"{self.environment['RAY_ADDRESS']}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})
        with urlopen(request) as answer:
            return done, json.load(answer)["driver_exit_code"]

    def ray(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `ray job WORDS` as a client."""
        command = [str(RAY), "job", *words]
        return subprocess.run(command, env=self.environment, check=check, capture_output=True, text=True, timeout=240)


def environment_of(home: Path) -> dict[str, str]:
    """Environment of a user with this home folder, whose clusters find each other and no others."""
    here = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return here | {"HOME": str(home), "RAY_TMPDIR": str(home), "PATH": f"{RAY.parent}:{here['PATH']}"}


@contextmanager
def started_head(folder: Path) -> Iterator[Head]:
    """Start a head on free ports, in a home folder with a token."""
    here = environment_of(folder)
    subprocess.run([RAY, "get-auth-token", "--generate"], env=here, check=True, capture_output=True)
    with socket.socket() as dashboard, socket.socket() as agent:
        for probe in (dashboard, agent):
            probe.bind(("127.0.0.1", 0))
        port, agent_port = (probe.getsockname()[1] for probe in (dashboard, agent))
        dashboard.close()
        agent.close()
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


def block(section: str, language: str, beginning: str = "") -> str:
    """The first code block below a heading that begins so."""
    text = README[README.index(f"\n## {section}") :]
    found = re.search(rf"```{language}\n({re.escape(beginning)}.*?)```", text, re.DOTALL)
    assert found, section
    return found[1]


SHORTER = "--epochs 1 --sum-head-steps 5"
"""For all trainings but the first: what they learn is tested there."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="h") as name, started_head(Path(name)) as head:
        yield head


@pytest.mark.timeout(1800)  # fifteen commands
def test_all_sections_but_the_clusters_in_a_new_home(head: Head) -> None:
    """As a reader does who begins at the top, with a small MNIST in ./data, ~/mnist and ./mnist.

    `ray stop` ends every cluster of the machine, so the head is started on free ports, and ended by its own handle. It runs from
    the beginning, since each job would start a cluster. Python: test_process_state.
    """
    home = head.folder
    for folder in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / folder, home / folder)
    write_small_mnist(home / "data")
    write_small_mnist(home / "mnist")
    environment = environment_of(home) | {"PYTHONPATH": str(home), "RAY_API_SERVER_ADDRESS": head.environment["RAY_ADDRESS"]}
    trainings = 0
    for section in ("Laptop", "One GPU box", "Train", "Score"):
        for line in block(section, "bash").splitlines():
            if line in ("ray start --head", "ray stop"):
                continue
            if re.search(r"jobs/train.py(?!.*--(help|print-config|resume))", line):
                line += f" {SHORTER}" if trainings else ""
                trainings += 1
            if line.startswith("ray job submit"):
                line = f"RAY_AUTH_MODE=token {line}"  # as the README says for such a head
            if "days/" in line:
                shutil.copytree(home / "test-pairs", home / "days" / "1")
                shutil.copy(next((home / "pairs").glob("*.parquet")), home / "late.parquet")
            done = subprocess.run(line, shell=True, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, (line, done.stderr[-2000:])
    assert [path.name for path in (home / ".ray").iterdir()] == ["auth_token"], "what Ray does for others stays as it was"
    check_outputs(home)


def check_outputs(home: Path) -> None:
    """What the README's commands have left in a folder."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in (home / "runs").glob("*/manifest.json")}
    assert [run["status"] for run in runs.values()] == ["finished"] * 5
    assert sorted(run["config"]["recipe"] for run in runs.values()) == ["long", *["short"] * 4]
    learned = runs["mine"]["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.98, "of the bundled sample"
    assert (home / "runs" / "mine" / "report.html").stat().st_size > 100_000
    assert (home / "test-scored" / "report.html").exists()
    names = [{file.name for file in (home / where).glob("part-*.parquet")} for where in ("pairs", "scored/predictions")]
    assert names[0] <= names[1]
    scored = json.loads((home / "scored" / "manifest.json").read_text())
    assert (scored["totals"]["scored_rows"], scored["totals"]["failed_files"]) == (10_250, 0)
    assert {file.name for file in (home / "exported").iterdir()} == {"model.pt2", "model.onnx"}
    check_pictures(home / "runs" / "mine")


def check_pictures(run: Path) -> None:
    """However a digit is drawn, most answers are sure, and none of these is wrong."""
    rows, model = pq.read_table(SAMPLE)[123::500], load_model(run)
    for form, draw in FORMS.items():
        found = [predict(model, draw(image), 3) for image in pixels_view(one_chunk(rows["image"]))]
        sure = {index: answer.digit for index, answer in enumerate(found) if not answer.unsure}
        assert len(sure) >= 8, form
        assert sure.items() <= dict(enumerate(rows["digit"].to_pylist())).items(), form


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


def test_submitted_jobs(head: Head, model: Path) -> None:
    """From a working directory. A job that is stopped says how to resume, and ends with one of our exit codes."""
    project = head.folder / "project"
    for name in ("jobs", "mnistsum_ray"):
        shutil.copytree(ROOT / name, project / name)
    with (project / "mnistsum_ray" / "__init__.py").open("a") as package:
        package.write('\n__version__ = "9.9.9"\n')  # the manifest shows it if this copy has run
    write_small_mnist(head.folder / "small")
    job, runs = f"job-{secrets.token_hex(4)}", head.folder / "runs"
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
    done, code = head.submit(*score, working_dir=project)
    assert (done.returncode, code) == (1, 3), f"3 is the job's, 1 that of `ray job submit`: {done.stdout}"
    line = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert (line["scored_rows"], line["failed_files"]) == (500, 1)
    assert (head.folder / "predictions" / "manifest.json").exists()
