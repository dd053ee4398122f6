"""What the documents tell people to run is what the code takes, and the map of the code is that of the code."""

import re
import shlex
from pathlib import Path

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import (
    ExportModelConfig,
    ExportPairsConfig,
    JobConfig,
    PredictConfig,
    ScoreConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnistsum_ray"
README = (ROOT / "README.md").read_text()
CONFIGS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "export_pairs": ExportPairsConfig,
    "export_model": ExportModelConfig,
    "predict": PredictConfig,
}
SHOWN = re.compile(
    r"(?:python (?=jobs/)|mnistsum (?=(?:train|score|export-[a-z]+) --|predict ))([a-z_/-]+(?:\.py)?[^\n`#]*)"
)


def test_a_command_that_is_shown_parses() -> None:
    texts = [README, (ROOT / "cluster.yaml").read_text(), (PACKAGE / "cli.py").read_text()]
    texts += [path.read_text() for path in (*ROOT.glob(".deploy/*"), *ROOT.glob("jobs/*.py"))]
    commands = {
        command for text in texts for command in SHOWN.findall(re.sub(r"\\\n#?", " ", text))
    }
    assert len(commands) > 20
    for command in commands:
        job, *flags = shlex.split(re.split(r"\s{3,}|&&|\|\||>", command)[0])
        assert not job.endswith(".py") or (ROOT / job).exists()
        config = CONFIGS.get(Path(job).stem.replace("-", "_"))
        if config and not {"--help", "--config"} & {*flags}:
            parse(config, flags, "")


def test_every_relative_link_leads_somewhere() -> None:
    for document in (
        ROOT / "README.md",
        *ROOT.glob(".readme/*.md"),
        *ROOT.glob("[mt]*/**/README.md"),
    ):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)


def test_the_map_names_every_module_and_no_other() -> None:
    """In its tree, a folder's modules stand before the first semicolon; those of the package itself are `name.py`."""
    text = (PACKAGE / "README.md").read_text()
    tree = text.partition("mnistsum_ray/\n")[2].partition("```")[0]
    named = {f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", tree)}
    for folder, modules in re.findall(r"^  (\w+)/ +([^;\n]+)", tree, re.MULTILINE):
        named |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", modules)}
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert named == {name for name in modules if "__" not in name}
