"""The example notebook, run from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    notebook = nbformat.read(ROOT / "jobs" / "example.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    assert len(notebook.cells) == 10
    trains = notebook.cells[2]
    trains.source, before = trains.source.replace("epochs=3, sum_head_steps=1000", "epochs=1, sum_head_steps=50"), trains.source
    assert trains.source != before, "the test trains for a shorter time"
    assert not any(cell.get("outputs") for cell in notebook.cells), "the file holds no output of another version"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    texts = [
        "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    assert "TrainResult(run=" in texts[2]
    assert "sum_accuracy" in texts[3]
    assert "the number is 15, not one of 0..9" in texts[7]
    assert "scored_rows=4, rejected_rows=1" in texts[8]
    assert "the number is 15, not one of 0..9" in texts[9]
    images = [output.data for index in (4, 6) for output in notebook.cells[index].outputs if "data" in output]
    assert all("image/png" in data for data in images)
    assert len(images) == 2
    # What a person sees of a bar is the widget's state.
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    bars = [widget.state for widget in widgets if widget.model_name == "FloatProgressModel"]
    assert bars
    assert not [bar.bar_style for bar in bars if bar.bar_style == "danger"], "a bar stays behind in red"
