"""What the documents tell people to run is what the code takes, and the map of the code is that of the code."""

import re
import shlex
from pathlib import Path

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ExportModelConfig, ExportPairsConfig, JobConfig, PredictConfig, ScoreConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mnistsum_ray"
README = (ROOT / "README.md").read_text()
MAP = (PACKAGE / "README.md").read_text()
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
CONFIGS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "export_pairs": ExportPairsConfig,
    "export_model": ExportModelConfig,
    "predict": PredictConfig,
}
SHOWN = re.compile(r"(?:python (?=jobs/)|mnistsum (?=(?:train|score|export-[a-z]+) --|predict ))([a-z_/-]+(?:\.py)?[^\n`#]*)")


def test_a_command_that_is_shown_parses() -> None:
    texts = [README, (ROOT / "cluster.yaml").read_text(), (PACKAGE / "cli.py").read_text()]
    texts += [path.read_text() for path in (*ROOT.glob(".deploy/*"), *ROOT.glob("jobs/*.py"))]
    commands = {command for text in texts for command in SHOWN.findall(re.sub(r"\\\n#?", " ", text))}
    assert len(commands) > 20
    for command in commands:
        job, *flags = shlex.split(re.split(r"\s{3,}|&&|\|\||>", command)[0])
        assert not job.endswith(".py") or (ROOT / job).exists()
        config = CONFIGS.get(Path(job).stem.replace("-", "_"))
        if config and not {"--help", "--print-config"} & {*flags}:
            parse(config, flags, "")


def test_every_relative_link_leads_somewhere() -> None:
    for document in (ROOT / "README.md", *ROOT.glob(".readme/*.md"), *ROOT.glob("[mt]*/**/README.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)


def test_the_readmes_commands_can_be_pasted() -> None:
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        assert "#" not in block, "zsh on a Mac takes a comment for arguments"


def test_what_the_readme_says_of_errors_is_what_the_program_says() -> None:
    """Each quotation, up to where something is filled in, stands in the code."""
    table = (ROOT / ".readme" / "messages.md").read_text()
    quoted = [text for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for text in re.findall("`(.*?)`", row)]
    code = re.sub(r'"\s+f?"', "", "".join(SOURCES.values()))  # a text that goes on in the next line
    of_ray = {"Unauthorized", "ray job submit"}
    assert of_ray < set(quoted)
    for text in set(quoted) - of_ray:
        assert text in code, text


def test_the_map_names_every_module_and_no_other() -> None:
    """In its tree, a folder's modules stand before the first semicolon; those of the package itself are `name.py`."""
    tree = MAP.partition("mnistsum_ray/\n")[2].partition("```")[0]
    named = {f"{name}.py" for name in re.findall(r"\b(\w+)\.py\b", tree)}
    for folder, modules in re.findall(r"^  (\w+)/ +([^;\n]+)", tree, re.MULTILINE):
        named |= {f"{folder}/{name}.py" for name in re.findall(r"\w+", modules)}
    assert named == {name for name in SOURCES if "__" not in name}


def test_what_the_map_names_exists_where_it_says() -> None:
    """Modules by their path or their unique name, definitions, `a definition` in `a module`, and flags."""
    for name in re.findall(r"`([\w/]+\.py)`", MAP):
        assert name in SOURCES or sum(module.endswith(f"/{name}") for module in SOURCES) == 1, name

    def defines(text: str, name: str) -> bool:
        return re.search(rf"^(class|def) {name}\b|^{name}\b.*=", text, re.MULTILINE) is not None

    for name in re.findall(r"`([A-Z]\w+|[a-z]+_\w+)`", MAP):
        assert name.startswith("ray_mnistsum_") or any(defines(text, name) for text in SOURCES.values()), name
    for name, module in re.findall(r"`(\w+)` in `([\w/]+\.py)`", MAP):
        assert defines(SOURCES[module], name), (name, module)
    flags = {field.replace("_", "-") for config in CONFIGS.values() for field in config.model_fields}
    assert {*re.findall(r"`--([a-z-]+)", MAP)} <= flags
