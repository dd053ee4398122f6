"""What the README and cluster.yaml tell people to run is what the code takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from mnistsum_ray.config import ExportConfig, JobConfig, ScoreConfig, TrainConfig, parse

ROOT = Path(__file__).parents[1]
README, CLUSTER = (ROOT / "README.md").read_text(), (ROOT / "cluster.yaml").read_text()
CONFIGS: dict[str, type[JobConfig]] = {"train": TrainConfig, "score": ScoreConfig, "export_pairs": ExportConfig}
TEXTS = [README, CLUSTER, *((ROOT / "jobs" / f"{job}.py").read_text() for job in CONFIGS)]
SHOWN = re.compile(r"python (jobs/[a-z_]+\.py[^\n`#]*)")
COMMANDS = sorted({command for text in TEXTS for command in SHOWN.findall(re.sub(r"\\\n#?", " ", text))})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_parses(command: str) -> None:
    job, *flags = shlex.split(re.split(r"\s{3,}|&&", command)[0])
    assert (ROOT / job).exists()
    config = CONFIGS.get(Path(job).stem)
    if config and "--help" not in flags:
        parse(config, flags, "")


@pytest.mark.parametrize("job", list(CONFIGS))
def test_every_job_is_shown(job: str) -> None:
    assert [command for command in COMMANDS if command.startswith(f"jobs/{job}.py")]


def test_every_relative_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_cluster_yaml_is_one() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CLUSTER))
    validate_config(config)
    assert "pip install" in " ".join(config["setup_commands"])
    requirements = re.search(r"dependencies = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert requirements
    for requirement in re.findall(r'"([^"]+)"', requirements[1]):
        if not requirement.startswith("numpy"):  # comes with all the others
            assert f"'{requirement}'" in " ".join(config["setup_commands"]), requirement
