"""What the documents tell people to run is what the code takes."""

import re
import shlex
from pathlib import Path

import pytest

from mnistsum_ray.arguments import parse
from mnistsum_ray.config import ExportModelConfig, ExportPairsConfig, JobConfig, PredictConfig, ScoreConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "score": ScoreConfig,
    "export_pairs": ExportPairsConfig,
    "export_model": ExportModelConfig,
}
TEXTS = [
    README,
    (ROOT / "cluster.yaml").read_text(),
    *((ROOT / ".deploy" / name).read_text() for name in ("rayjob.yaml", "raycronjob.yaml", "crontab")),
    (ROOT / "mnistsum_ray" / "cli.py").read_text(),
    *((ROOT / "jobs" / f"{job}.py").read_text() for job in CONFIGS),
]
SHOWN = re.compile(r"(?:python (?=jobs/)|mnistsum (?=(?:train|score|export-[a-z]+) --|predict ))([a-z_/-]+(?:\.py)?[^\n`#]*)")
COMMANDS = sorted({command for text in TEXTS for command in SHOWN.findall(re.sub(r"\\\n#?", " ", text))})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_parses(command: str) -> None:
    job, *flags = shlex.split(re.split(r"\s{3,}|&&|\|\||>", command)[0])
    assert not job.endswith(".py") or (ROOT / job).exists()
    config = (CONFIGS | {"predict": PredictConfig}).get(Path(job).stem.replace("-", "_"))
    if config and not {"--help", "--print-config"} & {*flags}:
        parse(config, flags, "")


def test_every_job_is_shown() -> None:
    shown = " ".join(SHOWN.findall(README))
    assert all(f"jobs/{job}.py" in shown for job in CONFIGS)


@pytest.mark.parametrize(
    "document",
    [path.relative_to(ROOT) for path in (ROOT / "README.md", *ROOT.glob(".readme/*.md"), *ROOT.glob("[mt]*/**/README.md"))],
    ids=str,
)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
        assert (ROOT / document.parent / link).exists(), link


def test_the_readme_is_short_and_can_be_pasted() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        assert "#" not in block, "zsh on a Mac takes a comment for arguments"


def test_what_the_readme_says_of_errors_is_what_the_program_says() -> None:
    """Each quotation, up to where something is filled in, stands in the code."""
    table = (ROOT / ".readme" / "messages.md").read_text()
    quoted = [text for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for text in re.findall("`(.*?)`", row)]
    code = "".join(path.read_text() for path in (ROOT / "mnistsum_ray").rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # a text that goes on in the next line
    of_ray = {"Unauthorized", "ray job submit"}
    assert of_ray < set(quoted)
    for text in set(quoted) - of_ray:
        assert text in code, text
