"""README's commands and Python, and the notebook, do what they say. `ray job`: test_connect."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from mnistsum_ray.cli import COMMANDS, parse
from tests.conftest import write_sample
from tests.jobs import ROOT, run_job

README = (ROOT / "README.md").read_text()
NOTEBOOK = ROOT / "jobs" / "example.ipynb"


def block(section: str, language: str) -> str:
    """The first block of code in a section."""
    text = README.partition(f"\n## {section}")[2]
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def commands_of(section: str) -> list[list[str]]:
    """The jobs in the first shell block of a section, as words of `mnistsum`."""
    found = re.findall(r"^python jobs/(\w+)\.py(.*)$", block(section, "bash"), re.MULTILINE)
    return [[job.replace("_", "-"), *shlex.split(flags)] for job, flags in found]


def run_command(name: str, *flags: str) -> None:
    """Run a command of `mnistsum` in this process, on the cluster that it has joined."""
    function, kind, _ = COMMANDS[name]
    function(parse(kind, list(flags), ""))


@pytest.fixture(scope="module")
def folder(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader who begins at the top has run the commands of the section Laptop."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train, *others = commands_of("Laptop")
        assert run_job(*train, cwd=folder).line  # as written: on a cluster of its own
        for command in others:
            run_command(*command)
    return folder


@pytest.mark.slow
def test_the_commands_of_train_and_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    learned = json.loads(Path("runs/mine/manifest.json").read_text())["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.97
    assert Path("scored/report.html").exists()
    for name, *flags in commands_of("Train") + commands_of("Score"):
        if flags == ["--help"]:
            continue
        if any("days/" in flag for flag in flags):
            shutil.copytree("test-pairs", "days/1")
            shutil.copy(next(Path("pairs").glob("*.parquet")), "late.parquet")
        if name == "export-pairs":  # README's are 10,000 of MNIST, which may not be here
            flags += ["--data", "sample", "--rows", "1000"]
        if "box" in flags:  # README's run is of MNIST; `--resume auto` finds the sample's
            flags[flags.index("box")] = "mine"
        if "--config" in flags:  # it would train as long as the run whose config it is
            flags += ["--epochs", "1"]
        run_command(name, *flags)
    runs = [json.loads(path.read_text()) for path in Path("runs").glob("*/manifest.json")]
    assert [each["status"] for each in runs] == ["finished", "finished"]
    scored = json.loads(Path("days-scored/manifest.json").read_text())["totals"]
    assert (scored["scored_rows"], scored["failed_files"]) == (1_250, 0)


@pytest.mark.slow
def test_the_example_in_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_sample(tmp_path / "rows.parquet", 500)
    written = 'data="sample", epochs=2)'
    smaller = f'data="{rows}", epochs=1)'
    code = block("From Python", "python")
    assert written in code
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code.replace(written, smaller), names)
    assert names["table"].num_rows == 250
    assert Path("scored-again/manifest.json").exists()


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def test_the_notebook_holds_the_outputs_of_its_cells_and_nothing_of_a_machine() -> None:
    code = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:]), "each cell but the imports shows something"
    outputs = json.dumps([cell.outputs for cell in code])
    shown = re.sub(r"[A-Za-z0-9+/=]{100,}", "", outputs)  # without pictures
    machine = r"(?<![\w.])/(tmp|root|home|usr|Users|work)/|127\.0\.0\.1|pid=|0x[0-9a-f]{6}"
    assert not re.search(rf"{machine}|Traceback", shown)


@pytest.mark.nightly
def test_the_notebook_runs(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    notebook = read_notebook()
    trains = next(cell for cell in notebook.cells if "fit(" in cell.source)
    written = 'data="sample", name="first", epochs=3, seed=0'
    assert written in trains.source
    rows = write_sample(tmp_path / "rows.parquet", 500)
    smaller = f'data="{rows}", epochs=1'
    trains.source = trains.source.replace(written, smaller)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "rejected_rows=1" in json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    # What a person sees of a bar is the widget's state.
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state
    widgets = [widget for widget in states.values() if widget.model_name == "FloatProgressModel"]
    bars = [widget.state.bar_style for widget in widgets]
    assert bars
    assert "danger" not in bars, "a bar stays behind in red"
