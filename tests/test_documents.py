"""Commands and links in the documents, and the map of the code, are those of the code."""

import re
import shlex

from mnistsum_ray.cli import COMMANDS, parse
from mnistsum_ray.config import recipe_defaults
from tests.jobs import ROOT

PACKAGE = ROOT / "mnistsum_ray"
SHOWN = re.compile(
    r"(?:python jobs/|mnistsum (?=[a-z-]+ --|predict ))([a-z_/-]+)(?:\.py)?([^\n`#]*)"
)


def test_a_command_that_is_shown_parses() -> None:
    files = [ROOT / "README.md", ROOT / "cluster.yaml", PACKAGE / "cli.py"]
    files += [*ROOT.glob(".deploy/*"), *ROOT.glob("jobs/**/*.py")]
    texts = [re.sub(r"\\\n#?", " ", file.read_text()) for file in files]
    commands = {command for text in texts for command in SHOWN.findall(text)}
    assert len(commands) > 20
    for job, words in commands:
        flags = shlex.split(re.split(r"\s{3,}|&&|\|\||>", words)[0])
        name = job.replace("_", "-")
        if name in COMMANDS and not {"--help", "--config"} & {*flags}:
            parse(COMMANDS[name][1], flags)
        else:
            assert (ROOT / "jobs" / f"{job}.py").exists(), job


def test_the_recipes_have_the_epochs_that_readme_says() -> None:
    text = (ROOT / "README.md").read_text()
    for recipe in ("quick", "short", "long"):
        epochs = recipe_defaults(recipe, small=False)["epochs"]
        assert re.search(rf"`{recipe}` \({epochs}\b", text), recipe


def test_every_relative_link_leads_somewhere() -> None:
    documents = [ROOT / "README.md", *ROOT.glob(".readme/*.md"), *ROOT.glob("[mt]*/**/README.md")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)


def test_the_map_names_every_module_and_no_other() -> None:
    """A folder's modules stand before the first semicolon; the package's own are `name.py`."""
    text = (PACKAGE / "README.md").read_text()
    tree = text.partition("mnistsum_ray/\n")[2].partition("```")[0]
    named = {f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", tree)}
    for folder, modules in re.findall(r"^  (\w+)/ +([^;\n]+)", tree, re.MULTILINE):
        named |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", modules)}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert named == {name for name in modules if "__" not in name}
