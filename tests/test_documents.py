"""Commands, links, tests and lines of code that the documents show are there; so is the map."""

import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mnistsum_ray.cli import COMMANDS, config_from_args
from mnistsum_ray.model.trial import try_task
from tests.jobs import ROOT

PACKAGE = ROOT / "mnistsum_ray"
DOCUMENTS = [*ROOT.glob("*.md")]
for folder in (".github", "docs", "jobs", "mnistsum_ray", "tests"):
    DOCUMENTS += (ROOT / folder).rglob("*.md")
SHOWN = re.compile(
    r"(?:python jobs/|mnistsum (?=[a-z-]+ --|predict ))([a-z_/-]+)(?:\.py)?([^\n`#]*)"
)


def test_the_figure_of_readme_is_that_of_its_script(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "docs" / "pictures" / "architecture.py", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    for name in ("architecture.svg", "architecture-dark.svg"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "pictures" / name).read_text()


def test_a_command_that_is_shown_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where files of tasks are
    Path("jobs").symlink_to(ROOT / "jobs")
    shutil.copy(ROOT / "jobs/examples/shapes.py", tmp_path)
    Path("adamw.py").write_text(blocks_of(ROOT / "docs/examples.md")[0])
    files = [*DOCUMENTS, ROOT / "cluster.yaml", PACKAGE / "cli.py"]
    files += [*ROOT.glob("docs/deploy/*"), *ROOT.glob("jobs/**/*.py")]
    texts = [re.sub(r"\\+\n#? *", " ", file.read_text()) for file in files]
    commands = {command for text in texts for command in SHOWN.findall(text)}
    assert len(commands) > 20
    for job, words in commands:
        flags = shlex.split(re.split(r"\s{3,}|&|\|\||>", words)[0])
        name = job.replace("_", "-")
        if name in COMMANDS and not {"--help", "--config"} & {*flags}:
            config_from_args(COMMANDS[name][1], flags)
        else:
            assert (ROOT / "jobs" / f"{job}.py").exists(), job


def blocks_of(document: Path) -> list[str]:
    """The blocks of Python in a document."""
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


def test_the_task_on_the_page_is_that_of_its_file_and_keeps_its_promises() -> None:
    """But for the file's docstring, and what draws pictures with its imports."""
    of_examples: dict[str, Any] = {"__name__": "a_page"}
    exec(blocks_of(ROOT / "docs/examples.md")[0], of_examples)
    assert try_task(of_examples["WithAdamW"]())
    shown, table = [block for block in blocks_of(ROOT / "docs/task.md") if "(Task):" in block]
    in_file = (ROOT / "jobs/examples/shapes.py").read_text()
    task = in_file.partition('"""\n\n')[2].partition("\n\n\ndef draw(")[0] + "\n"
    of_drawing = ["import sys", "from pathlib import Path", ""]
    of_drawing += ["import pyarrow as pa", "import pyarrow.parquet as pq"]
    lines = [line for line in task.splitlines() if line not in of_drawing]
    assert [line for line in shown.splitlines() if line] == lines
    names: dict[str, Any] = {"__name__": "a_page"}
    exec(shown, names)
    assert try_task(names["Shapes"]()) == ("accuracy",)
    exec(table, names)
    assert try_task(names["Flats"]()) == ("accuracy",)
    (excerpt,) = blocks_of(ROOT / "README.md")
    of_file = {line.strip() for line in lines}
    omitted = "...  # any PyTorch network that treats each row alone (so no BatchNorm)"
    assert {line.strip() for line in excerpt.splitlines()} - of_file == {omitted, ""} - of_file


def test_every_relative_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*|\s[^)]*)?\)", text)
        links += re.findall(r'(?:src|srcset)="([^":]+)"', text)
        for link in links:
            assert (document.parent / link).exists(), (document, link)
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]+)\)", text):
            target = document.parent / link if link else document
            assert anchor in anchors_of(target), (document, link, anchor)


def anchors_of(document: Path) -> set[str]:
    """What a link into a document may name, by its titles."""
    titles = re.findall(r"^##+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_test_that_is_named_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"\btest_\w+(?!\w|\.py)", document.read_text()):
            assert f"def {name}(" in tests, (document, name)


def test_the_lines_of_the_walk_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    lines = {line.strip() for line in code.splitlines()}
    walk = (ROOT / "docs" / "walk.md").read_text()
    shown = "".join(re.findall(r"```python\n(.*?)```", walk, re.DOTALL)).splitlines()
    assert len(shown) > 50
    assert not {line.strip() for line in shown} - lines - {"..."}


def test_each_line_of_the_messages_page_is_in_the_code() -> None:
    """But for those of Ray."""
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/messages.md").read_text(), re.MULTILINE)
    texts = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if " job " not in text]
    of_ray = ["Unauthorized", "Failed to connect to GCS within 60 seconds"]
    of_ray.append("constructor arguments in the object store and max_restarts > 0")
    assert len(texts) > 7
    assert [text for text in texts if text not in code] == of_ray


def test_the_map_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "map.md").read_text()
    tree = text.partition("mnistsum_ray/\n")[2].partition("```")[0]
    named: set[str] = set()
    folders: list[str] = []
    for indent, name in re.findall(r"^( +)([\w./]+)  ", tree, re.MULTILINE):
        del folders[len(indent) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert named == {name for name in modules if "__" not in name}
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    imports_go_down = re.findall(r"\w+", " ".join(layers["contracts"][0]["layers"]))
    assert re.findall(r"^  (\w+)", tree, re.MULTILINE) == imports_go_down
