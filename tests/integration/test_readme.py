"""README's commands and Python, and the notebook, do what they say. `ray job`: test_connect."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from mnistsum_ray.cli import COMMANDS, parse
from mnistsum_ray.config import TrainConfig
from tests.integration.test_tasks import write_rows
from tests.jobs import ROOT, run_job

README = (ROOT / "README.md").read_text()
NOTEBOOK = ROOT / "jobs" / "example.ipynb"


def blocks(section: str, language: str) -> str:
    """The blocks of code in a section."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def commands_of(section: str) -> list[list[str]]:
    """The jobs in the shell blocks of a section, as words of `mnistsum`."""
    jobs = r"^(?:python jobs/(?=\w+\.py)|mnistsum )([\w-]+)(?:\.py)?(.*)$"
    found = re.findall(jobs, blocks(section, "bash"), re.MULTILINE)
    return [[job.replace("_", "-"), *shlex.split(flags, comments=True)] for job, flags in found]


def run_command(name: str, *flags: str) -> str:
    """Run a command of `mnistsum` on the cluster of this process; what it says."""
    function, kind, _ = COMMANDS[name]
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
        function(parse(kind, list(flags)))
    return said.getvalue()


FIRST = "First five minutes"
ONE_THREAD = ("--threads", "1")


@pytest.fixture(scope="module")
def said(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the commands of the first minutes say. The working folder is that of their reader."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "docs" / "pictures", folder / "docs" / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train, *others = commands_of(FIRST)
        # On a cluster of its own. Beside other tests two threads wait for each other: with a core
        # that is busy, 230 rows/s, and one thread 850.
        done = run_job(*train, *ONE_THREAD, cwd=folder)
        assert done.out == json.dumps(done.line) + "\n", "the result alone"
        yield done.err + "".join(run_command(*command) for command in others)


def form_of(line: str) -> str:
    """A line without what differs between two runs: time, name, folders, figures."""
    line = re.sub(r"^[\d:]{8} \S+  ", "", line)
    line = re.sub(r"/\S*/", "/", line)
    return re.sub(r"[\d.,]+|(?<=worker|thread)s|bf16|fp32", "", line)


@pytest.mark.slow
def test_the_output_that_is_shown_has_the_form_of_what_is_said(said: str) -> None:
    text = blocks(FIRST, "text")
    shown = [line for line in text.splitlines() if re.match(r"\d\d:|digit|settings", line)]
    assert len(shown) > 10
    lines = [line for line in said.splitlines() if "(raylet)" not in line]  # of a busy machine
    assert {*map(form_of, shown)} <= {*map(form_of, lines)}
    assert not [line for line in lines if re.search(r"INFO|WARNING|\(pid=|dataset_", line)]
    tree = re.findall(r"^  ([\w./]+)  ", text, re.MULTILINE)
    assert len(tree) == 6
    assert all(Path("runs/mine", name).exists() for name in tree)


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_the_commands_of_train_and_score() -> None:
    learned = json.loads(Path("runs/mine/manifest.json").read_text())["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.97
    assert Path("scored/report.html").exists()
    for name, *flags in commands_of("Train") + commands_of("Score"):
        if "--config" in flags:
            parse(TrainConfig, flags)  # test_train.py trains so
        elif flags != ["--help"]:
            run_command(name, *flags)
    for output, resumed in (("scored", 2_000), ("strict-scored", 0)):
        totals = json.loads(Path(output, "manifest.json").read_text())["totals"]
        assert (totals["scored_rows"], totals["resumed_rows"]) == (2_500, resumed)


@pytest.mark.nightly
@pytest.mark.usefixtures("said")
def test_a_training_that_is_killed_by_these_commands_has_the_same_bits() -> None:
    Path("jobs").symlink_to(ROOT / "jobs")
    commands = blocks("Kill it", "bash").replace(
        "--name killed", shlex.join(["--name", "killed", *ONE_THREAD])
    )
    done = subprocess.run(
        ["bash", "-c", commands],
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("the same bits\n"), done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_the_example_in_python() -> None:
    code, written = blocks("From Python", "python"), 'data="sample", epochs=2)'
    assert written in code
    names: dict[str, Any] = {}
    exec(code.replace(written, 'name="mine", resume=True)'), names)  # which trains no more
    assert names["table"].num_rows == 250
    assert Path("scored-again/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_task_of_the_page_trains_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python; test_tasks.py has the commands."""
    monkeypatch.chdir(tmp_path)
    write_rows("shapes", Path("shapes"), 500)
    write_rows("shapes", Path("new"), 50)
    code, written = blocks("For your own task", "python"), "dropout=0.2)"
    assert written in code
    # As in a notebook, whose classes are those of `__main__`.
    exec(code.replace(written, "dropout=0.2, epochs=1, threads=1)"), {"__name__": "__main__"})
    columns = pq.read_schema("out-again/predictions/shapes.parquet").names
    assert columns == ["shape", "pred_shape", "shape_prob", "reason"]


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def results_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The forms of the results of a notebook's cells, without the folder where it runs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.data["text/plain"] for output in outputs if "execution_count" in output]
    texts = [re.sub(r"/\S*/(?=runs/|scored)", "", text) for text in texts]
    return [" ".join(form_of(text).split()) for text in texts]


@pytest.mark.nightly
def test_the_notebook_runs_and_shows_what_it_holds(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    notebook = read_notebook()
    held = results_of(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert results_of(notebook) == held
