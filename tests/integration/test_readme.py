"""The commands and programs of README, the pages and the notebook do what is shown of them.

`ray job`: test_connect.
"""

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from mnistsum_ray import ScoreConfig, TrainConfig, fit, score
from mnistsum_ray.cli import COMMANDS, config_from_args
from tests import record
from tests.integration.test_tasks import write_rows
from tests.jobs import ROOT

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "task.md"
NOTEBOOK = ROOT / "jobs" / "example.ipynb"


def shell_of(section: str) -> str:
    """The shell blocks of a section of README."""
    text = README.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))


def commands_of(section: str) -> list[list[str]]:
    """The jobs in the shell blocks of a section of README, as words of `mnistsum`."""
    jobs = r"^(?:python jobs/(?=\w+\.py)|mnistsum )([\w-]+)(?:\.py)?(.*)$"
    found = re.findall(jobs, shell_of(section), re.MULTILINE)
    return [[job.replace("_", "-"), *shlex.split(flags, comments=True)] for job, flags in found]


def programs_of(document: Path) -> list[str]:
    """The blocks of Python in a document."""
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


def run_command(name: str, *flags: str) -> str:
    """Run a command of `mnistsum` on the cluster of this process; what it says."""
    function, kind, _ = COMMANDS[name]
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
        function(config_from_args(kind, list(flags)))
    return said.getvalue()


@pytest.fixture(scope="module")
def said(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What the first commands of README say. The working folder is that of their reader."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield {name: run_block(README, name) for name in ("train", "score")}


def run_block(page: Path, name: str) -> list[str]:
    commands = record.shell_block_of(page, name)
    return record.run_shell(commands, Path.cwd(), record.environment())


def check_block(name: str, said: list[str]) -> None:
    """Compare what commands say with the record, to the last digit on a machine of its kind."""
    recorded = record.read_record()["blocks"]
    is_same = record.is_like(recorded["machine"])
    found, expected = (
        [record.stable(line, is_same_machine=is_same) for line in lines]
        for lines in (record.shown_of(name, said), recorded[name]["lines"])
    )
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "score"])
def test_the_commands_of_readme_say_what_is_shown(said: dict[str, list[str]], name: str) -> None:
    check_block(name, said[name])
    lines = [line for line in said[name] if "(raylet)" not in line]  # of a busy machine
    assert not [line for line in lines if re.search(r"INFO|WARNING|\(pid=|dataset_", line)]
    tree = README.read_text().partition("\nruns/mine/\n")[2].partition("```")[0]
    names = re.findall(r"^  ([\w./]+)  ", tree, re.MULTILINE)
    assert len(names) == 6
    assert all(Path("runs/mine", name).exists() for name in names)


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_the_commands_that_train_and_score_more() -> None:
    learned = json.loads(Path("runs/mine/manifest.json").read_text())["metrics"]["test"]
    assert min(learned["digit_accuracy"], learned["sum_accuracy"]) >= 0.97
    assert Path("scored/report.html").exists()
    for name, *flags in commands_of("Train and score more"):
        if "--config" in flags:
            config_from_args(TrainConfig, flags)  # test_train.py trains so
        elif flags != ["--help"]:
            run_command(name, *flags)
    for output, resumed in (("scored", 2_000), ("strict-scored", 0)):
        totals = json.loads(Path(output, "manifest.json").read_text())["totals"]
        assert (totals["scored_rows"], totals["resumed_rows"]) == (2_500, resumed)


@pytest.mark.nightly
@pytest.mark.usefixtures("said")
def test_a_training_that_is_killed_by_these_commands_has_the_same_bits() -> None:
    check_block("killed", run_block(README, "killed"))


@pytest.mark.nightly
def test_the_commands_of_the_guide_say_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    for name in ("first", "shapes", "out"):
        check_block(name, run_block(GUIDE, name))


@pytest.mark.slow
@pytest.mark.usefixtures("said")
def test_the_example_in_python() -> None:
    code, written = programs_of(ROOT / "docs" / "python.md")[0], 'data="sample", epochs=2)'
    assert written in code
    names: dict[str, Any] = {}
    exec(code.replace(written, 'name="mine", resume=True)'), names)  # which trains no more
    assert names["table"].num_rows == 250
    assert Path("scored-again/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_task_of_the_guide_trains_and_scores_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows("shapes", Path("shapes"), 500)
    write_rows("shapes", Path("new"), 50)
    code, written = "".join(programs_of(GUIDE)), "dropout=0.2)"
    assert written in code
    # As in a notebook, whose classes are those of `__main__`.
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(code.replace(written, "dropout=0.2, epochs=1, threads=1)"), names)
    columns = pq.read_schema("out-again/predictions/shapes.parquet").names
    assert columns == ["shape", "pred_shape", "shape_prob", "reason"]

    rooms = [1, 2, 3, 4] * 100
    flats = {
        "city": ["Bern", "Lyon"] * 200,
        "area": [30 * n + row / 100 if n < 4 else None for row, n in enumerate(rooms)],
        "words": [[*range(n), row + 9] for row, n in enumerate(rooms)],
        "rooms": rooms,
    }
    pq.write_table(pa.table(flats), tmp_path / "flats.parquet")
    settings: dict[str, Any] = {"epochs": 20, "learning_rate": 0.05, "threads": 1, "name": "flats"}
    trained = fit(TrainConfig(task=names["Flats"], data="flats.parquet", **settings))
    assert trained.line()["test"]["accuracy"] > 0.9
    request: dict[str, Any] = {"model": trained.run, "input": "flats.parquet", "output": "rooms"}
    scored = score(ScoreConfig(task=names["Flats"], rooms_column="rooms", **request))
    assert scored.scored_rows == 400
    predicted = pq.read_table("rooms/predictions/flats.parquet").to_pandas()
    assert (predicted["pred_rooms"] == predicted["rooms"]).mean() > 0.9


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call, no-any-return]


def results_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The results of a notebook's cells, without figures and the folder where it runs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.data["text/plain"] for output in outputs if "execution_count" in output]
    texts = [re.sub(r"/\S*/(?=runs/|scored)", "", text) for text in texts]
    return [" ".join(re.sub(r"[\d.,]+", "", text).split()) for text in texts]


@pytest.mark.nightly
def test_the_notebook_runs_and_shows_what_it_holds(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    notebook = read_notebook()
    held = results_of(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert results_of(notebook) == held
