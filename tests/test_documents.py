"""Commands, links, tests and lines of code that the documents show are there; so is the map."""

import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path

from mnistsum_ray.cli import COMMANDS, parse
from mnistsum_ray.config import recipe_defaults
from tests.jobs import ROOT

PACKAGE = ROOT / "mnistsum_ray"
DOCUMENTS = [ROOT / "README.md"]
for folder in (".deploy", ".github", ".readme", "jobs", "mnistsum_ray", "tests"):
    DOCUMENTS += (ROOT / folder).rglob("*.md")
SHOWN = re.compile(
    r"(?:python jobs/|mnistsum (?=[a-z-]+ --|predict ))([a-z_/-]+)(?:\.py)?([^\n`#]*)"
)


def test_the_figure_of_readme_is_that_of_its_script(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / ".readme" / "architecture.py", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    for name in ("architecture.svg", "architecture-dark.svg"):
        assert (tmp_path / name).read_text() == (ROOT / ".readme" / name).read_text()


def test_a_command_that_is_shown_parses() -> None:
    files = [*DOCUMENTS, ROOT / "cluster.yaml", PACKAGE / "cli.py"]
    files += [*ROOT.glob(".deploy/*"), *ROOT.glob("jobs/**/*.py")]
    texts = [re.sub(r"\\\n#?", " ", file.read_text()) for file in files]
    commands = {command for text in texts for command in SHOWN.findall(text)}
    assert len(commands) > 20
    for job, words in commands:
        flags = shlex.split(re.split(r"\s{3,}|&|\|\||>", words)[0])
        name = job.replace("_", "-")
        if name in COMMANDS and not {"--help", "--config"} & {*flags}:
            parse(COMMANDS[name][1], flags)
        else:
            assert (ROOT / "jobs" / f"{job}.py").exists(), job


def test_the_recipes_have_the_epochs_that_readme_says() -> None:
    text = (ROOT / "README.md").read_text()
    for recipe in ("quick", "short", "long"):
        epochs = recipe_defaults(recipe, few_rows=False)["epochs"]
        assert re.search(rf"`{recipe}` \({epochs}\b", text), recipe


def test_every_relative_link_leads_somewhere() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*|\s[^)]*)?\)", text)
        links += re.findall(r'(?:src|srcset)="([^":]+)"', text)
        for link in links:
            assert (document.parent / link).exists(), (document, link)
        titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors, document


def test_every_test_that_is_named_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"\btest_\w+(?!\w|\.py)", document.read_text()):
            assert f"def {name}(" in tests, (document, name)


def test_the_lines_of_the_walk_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    lines = {line.strip() for line in code.splitlines()}
    walk = (ROOT / "jobs" / "README.md").read_text()
    shown = "".join(re.findall(r"```python\n(.*?)```", walk, re.DOTALL)).splitlines()
    assert len(shown) > 60
    assert not {line.strip() for line in shown} - lines - {"..."}


def test_each_line_of_the_messages_page_is_in_the_code() -> None:
    """But for those of Ray."""
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / ".readme/messages.md").read_text(), re.MULTILINE)
    texts = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if " job " not in text]
    of_ray = ["Unauthorized", "constructor arguments in the object store and max_restarts > 0"]
    assert len(texts) > 7
    assert [text for text in texts if text not in code] == of_ray


def test_the_map_names_every_module_and_no_other() -> None:
    """A folder's modules stand before the first semicolon; the package's own are `name.py`."""
    text = (PACKAGE / "README.md").read_text()
    tree = text.partition("mnistsum_ray/")[2].partition("```")[0]
    named = {f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", tree)}
    for folder, modules in re.findall(r"^  (\w+)/ +([^;\n]+)", tree, re.MULTILINE):
        named |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", modules)}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert named == {name for name in modules if "__" not in name}
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    imports_go_down = re.findall(r"\w+", " ".join(layers["contracts"][0]["layers"]))
    assert re.findall(r"^  (\w+)", tree, re.MULTILINE) == imports_go_down
