"""The example notebook, run from its first cell to its last.

`python -m tests.integration.test_notebook` runs it and writes its outputs into the file.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.conftest import ROOT

NOTEBOOK = ROOT / "jobs" / "example.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def test_the_file_holds_the_outputs_of_its_cells_and_nothing_of_a_machine() -> None:
    text, notebook = NOTEBOOK.read_text(), read()
    assert len(text) < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:]), "each cell but the imports shows something"
    shown = re.sub(
        r"[A-Za-z0-9+/=]{100,}", "", json.dumps([cell.outputs for cell in code])
    )  # without pictures
    assert not re.search(
        r"(?<![\w.])/(tmp|root|home|usr|opt|var|Users|work)/|127\.0\.0\.1|localhost|pid=|0x[0-9a-f]{6}",
        shown,
    )
    assert "Traceback" not in shown


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable[[int], Path]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    notebook = read()
    trains = next(cell for cell in notebook.cells if "fit(" in cell.source)
    written, smaller = (
        'data="sample", name="first", epochs=3, sum_head_steps=1000',
        f'data="{write_rows(500)}", epochs=1',
    )
    assert written in trains.source
    trains.source = trains.source.replace(written, f"{smaller}, sum_head_steps=5")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for text in (
        "TrainResult(run=",
        "PicturePrediction(number=5, digit=",
        "image/png",
        "rejected_rows=1",
    ):
        assert text in shown, text
    # What a person sees of a bar is the widget's state.
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    bars = [
        widget.state.bar_style for widget in widgets if widget.model_name == "FloatProgressModel"
    ]
    assert bars
    assert "danger" not in bars, "a bar stays behind in red"


def write_outputs() -> None:
    """Run the notebook and keep its results: no progress, and paths from the folder of its runs."""
    notebook = read()
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            results = [output for output in cell.outputs if output.output_type == "execute_result"]
            shown = re.sub(r"/[^\s\"',]*?/(?=(runs|scored)\b)", "", json.dumps(results))
            cell.outputs = nbformat.from_dict(json.loads(shown))  # type: ignore[no-untyped-call]
    nbformat.write(notebook, NOTEBOOK)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    write_outputs()
