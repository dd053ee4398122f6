"""README's commands and Python, and the notebook, do what they say. `ray job submit`: test_connect.

`python -m tests.integration.test_readme` runs the notebook and writes its outputs into the file.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from mnistsum_ray.arguments import parse
from mnistsum_ray.cli import COMMANDS
from tests.integration.conftest import ROOT, run_job

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


@pytest.fixture(scope="module")
def folder(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader who begins at the top has run the commands of the section Laptop."""
    folder = tmp_path_factory.mktemp("reader")
    for name, *flags in commands_of("Laptop"):
        assert run_job(name.replace("-", "_"), *flags, cwd=folder).line  # each with its own cluster
    return folder


@pytest.mark.slow
def test_the_commands_of_train_and_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process. No training on full MNIST is run: `--resume` finds the sample's run."""
    monkeypatch.chdir(folder)
    learned = json.loads(Path("runs/mine/manifest.json").read_text())["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.98
    assert Path("scored/report.html").exists()
    for name, *flags in commands_of("Train") + commands_of("Score"):
        if flags == ["--help"]:
            continue
        if any("days/" in flag for flag in flags):
            shutil.copytree("test-pairs", "days/1")
            shutil.copy(next(Path("pairs").glob("*.parquet")), "late.parquet")
        if name == "export-pairs":
            flags += ["--data", "sample"]
        if name == "train":
            flags = ["mine" if flag == "box" else flag for flag in flags]
            flags += ["--epochs", "1"] if "--config" in flags else []
        function, kind, _ = COMMANDS[name]
        function(parse(kind, flags, ""))
    runs = [json.loads(path.read_text()) for path in Path("runs").glob("*/manifest.json")]
    assert [each["status"] for each in runs] == ["finished", "finished"]
    scored = json.loads(Path("days-scored/manifest.json").read_text())["totals"]
    assert (scored["scored_rows"], scored["failed_files"]) == (10_250, 0)
    assert Path("exported/model.onnx").exists()


@pytest.mark.slow
def test_the_example_in_python(
    folder: Path, write_rows: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, smaller = 'data="sample", epochs=2)', f'data="{write_rows(500)}", epochs=1)'
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


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[[int], Path]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    notebook = read_notebook()
    trains = next(cell for cell in notebook.cells if "fit(" in cell.source)
    written = 'data="sample", name="first", epochs=3, sum_head_steps=1000'
    assert written in trains.source
    smaller = f'data="{write_rows(500)}", epochs=1, sum_head_steps=5'
    trains.source = trains.source.replace(written, smaller)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "rejected_rows=1" in json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    # What a person sees of a bar is the widget's state.
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state
    widgets = [widget for widget in states.values() if widget.model_name == "FloatProgressModel"]
    bars = [widget.state.bar_style for widget in widgets]
    assert bars
    assert "danger" not in bars, "a bar stays behind in red"


def write_outputs() -> None:
    """Run the notebook and keep its results: no progress, and paths from the folder of its runs."""
    notebook = read_notebook()
    with TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    kernel = notebook.metadata["kernelspec"]
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            results = [one for one in cell.outputs if one.output_type == "execute_result"]
            shown = re.sub(r"/[^\s\"',]*?/(?=(runs|scored)\b)", "", json.dumps(results))
            cell.outputs = nbformat.from_dict(json.loads(shown))  # type: ignore[no-untyped-call]
    nbformat.write(notebook, NOTEBOOK)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    write_outputs()
